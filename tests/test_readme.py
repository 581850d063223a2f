"""What the README and the pages beside it show: a user's commands, files and lines are followed as they stand."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro
from conftest import write_dataset
from rich.console import Console

from eval import TASKS, command
from vlprune import prune, report
from vlprune.models import FAMILIES, MODELS, load_model
from vlprune.models.registry import get_family
from vlprune.pruners import PRUNERS
from vlprune.statistics import STATISTICS
from vlprune.sweep.command import sweep
from vlprune.sweep.given import settings_given
from vlprune.sweep.options import Options, quickstart
from vlprune.sweep.planner import Planner
from vlprune.sweep.table import load_table
from vlprune.testing import check_pruner

PROJECT = Path(__file__).parents[1]
README = PROJECT / "README.md"
METHODS = PROJECT / "docs" / "methods.md"
EXPERIMENTS = [PROJECT / "experiments" / name / "README.md" for name in ("paper", "real_small")]
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md")), *EXPERIMENTS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def own_file(name: str) -> str:
    """The README's block that is the file of that name."""
    (found,) = [text for text in blocks(README, "python") if text.startswith(f"# {name}\n")]
    return found


OWN = [text.partition("\n")[0].removeprefix("# ") for text in blocks(README, "python") if text.startswith("# ")]


# ---- commands ----


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, in words."""
    found = []
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    found.append(words)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch, scenes_cache):
    """A working directory with what the commands name: a data set DIR, the tables, stored predictions."""
    directory = write_dataset(tmp_path / "DIR")
    answers = json.loads((directory / "test_annotations.json").read_text())["annotations"]
    lines = [json.dumps({"question_id": row["question_id"], "answer": "yes"}) for row in answers]
    (tmp_path / "results" / "predictions").mkdir(parents=True)
    (tmp_path / "results" / "predictions" / "KEY.jsonl").write_text("\n".join(lines))
    (directory / "vqa").mkdir()
    asked = [{"question_id": row["question_id"], "question": "?", "image": "a.jpg"} for row in answers]
    (directory / "vqa" / "vqa_test.json").write_text(json.dumps(asked))
    (tmp_path / "DATA").mkdir()
    (tmp_path / "experiments").symlink_to(PROJECT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(options: type, words: list[str]):
    return tyro.cli(options, args=words)


def dry_sweep(words: list[str]) -> None:
    """Plans a sweep of the embedded models in full; of other models it reads the table with the given settings."""
    options = replace(parse(Options, words), dry_run=True, remote=None)
    given, _ = settings_given(options)
    data = None if options.data is None else str(options.data.resolve())
    table = load_table(options.table or quickstart(), given, data, options.limit)
    if {cell.config.model.name for cell in table.cells} <= MODELS.keys():
        assert sweep(options, Planner(), _never, Console(quiet=True)) == 0


def _never(*_: object) -> None:
    raise AssertionError("a dry run does no work")


def follow(words: list[str], monkeypatch) -> None:
    """Follows a command as far as it goes without models and data that are not here."""
    program, *rest = words
    if program == "accelerate":
        assert rest[0] == "launch"
        return follow(["python", *rest[rest.index("-m") :]], monkeypatch)
    if not Path(program).name.startswith("python"):
        known = {"pip": ["install", "-e"], "mv": []}[Path(program).name]
        assert rest[: len(known)] == known
        extras = re.findall(r"\.\[(.*)\]", " ".join(rest)) if known else []
        document = tomllib.loads((PROJECT / "pyproject.toml").read_text())
        assert set(extras) <= document["project"]["optional-dependencies"].keys()
    elif rest[0].endswith(".py"):
        path = PROJECT / rest[0]
        monkeypatch.syspath_prepend(str(path.parent))
        parse(importlib.import_module(path.stem).Settings, rest[1:])
    else:
        assert rest[0] == "-m"
        module, arguments = rest[1], rest[2:]
        if module == "vlprune.sweep":
            dry_sweep(arguments)
        elif module == "vlprune.prune":
            assert prune._configs(parse(prune.Arguments, arguments))
        elif module == "vlprune.report":
            parse(report.Options, arguments)
        elif module.startswith("eval."):
            command.run(TASKS[module.removeprefix("eval.")], arguments=arguments)
        else:
            assert module in ("venv", "pytest")


@each_page
def test_commands_can_be_given(page, place, monkeypatch):
    for words in commands(page):
        follow(words, monkeypatch)


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve()
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings], target


def test_the_table_in_toml(tmp_path):
    (text,) = blocks(README, "toml")
    path = tmp_path / "table.toml"
    path.write_text(text)
    assert len(load_table(path).cells) == 1 + 2 * 2 * 3  # the dense run, methods, sparsities, ridges


# ---- what a user adds ----

TABLE = """
[base.finetuning]
steps = 1

[[grid]]
models = ["summed"]
methods = ["taylor"]
sparsities = [0.5]
tasks = ["zeroshot"]
pruning.options.norm = [0.0, 1.0]
task.options.prompt = ["", "this is "]

[[grid]]
models = ["summed"]
methods = ["omp"]
sparsities = [0.5]
tasks = ["zeroshot"]
task.options.prompt = ["", "this is "]
"""


def insert(path: Path, before: str, line: str) -> None:
    """Inserts a line into a file behind some text."""
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"{before}{line}"))


def line_of(registry: str) -> tuple[str, str]:
    """The line that the README adds to a registry, and the file that it names."""
    text = README.read_text(encoding="utf-8")
    (found,) = re.findall(rf"Add the line\s+`([^`]+)` to `{registry}` in\s+`([^`]+)`", text)
    return found


@pytest.fixture(scope="module")
def extended(tmp_path_factory, scenes_cache):
    """A copy of the code with the README's three files and their lines, and what a sweep of all three printed there."""
    root = tmp_path_factory.mktemp("extended")
    for package in ("vlprune", "eval"):
        shutil.copytree(PROJECT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in OWN:
        (root / name).write_text(own_file(name))
    line, file = line_of("NAMES")
    insert(root / file, "\nNAMES = (\n", f"    {line}\n")
    line, file = line_of("FAMILIES")
    insert(root / file, "\nFAMILIES: dict[str, str] = {\n", f"    {line}\n")
    line, file = line_of("MODULES")
    insert(root / file, "\nMODULES = (\n", f"    {line}\n")
    shutil.copytree(MODELS["tiny-xvlm"], root / "summed")
    config = (root / "summed" / "config.json").read_text()
    (root / "summed" / "config.json").write_text(config.replace('"family": "xvlm"', '"family": "summed-xvlm"'))
    (root / "own.toml").write_text(TABLE)
    arguments = ["own.toml", "--limit", "12", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vlprune.sweep", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


def test_own_method_task_and_family_stand_in_the_printed_table(extended):
    _, printed = extended
    table = printed.partition("runs finished, 0 failed")[2]
    assert "summed" in table  # a model of the family, which no other code can load
    assert "itc_r1" in table
    for prompt in ("", "this is"):
        assert re.search(rf"dense prompt={prompt} +\d", table), table
        for norm in (0, 1):
            assert re.search(rf"taylor prompt={prompt} +norm={norm} +\d", table), table
    assert re.search(r"chance +8\.3", table), table


def test_another_process_does_not_know_the_own_family(extended):
    root, _ = extended
    with pytest.raises(ValueError, match="summed-xvlm"):
        load_model(str(root / "summed"))


def test_the_report_of_copied_results_needs_nothing_else(extended, tmp_path):
    root, _ = extended
    shutil.copytree(root / "results", tmp_path / "COPY", ignore=shutil.ignore_patterns("cache"))
    text = report.report(report.Options(table="own-limit-12", results=tmp_path / "COPY"))
    assert "taylor" in text
    assert text.strip() in (root / "results/tables/own-limit-12.md").read_text()


@pytest.mark.parametrize("name", OWN)
def test_own_files_are_short(name):
    assert len([line for line in own_file(name).splitlines() if line.strip()]) <= 20


def test_the_own_method_keeps_to_the_contract():
    space = {"__name__": "taylor"}
    exec(compile(own_file("vlprune/pruners/taylor.py"), "README.md", "exec"), space)
    check_pruner(space["TAYLOR"])


LINES = [(page, text) for page in PAGES for text in blocks(page, "python") if not text.startswith("# ")]


@pytest.mark.parametrize(("page", "text"), LINES, ids=[page.stem for page, _ in LINES])
def test_lines_in_python_run_as_they_stand(page, text, extended, monkeypatch, capsys):
    root, _ = extended
    monkeypatch.chdir(root)
    space: dict = {}
    exec(compile(text, str(page), "exec"), space)
    if page == README:
        assert "'tr_r1': " in capsys.readouterr().out
        assert set(space["df"].method) == {"dense", "taylor", "omp"}


# ---- docs/methods.md follows the code ----


def rows_under(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of docs/methods.md."""
    text = METHODS.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group().splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def options_under(heading: str) -> dict[str, dict[str, str]]:
    """{owner: {option: default}} of a table of options; a row without an owner belongs to the one above."""
    found: dict[str, dict[str, str]] = {}
    own: dict[str, str] = {}
    for owner, option, kind, default, meaning in rows_under(heading):
        if owner:
            own = found.setdefault(owner.strip("`"), {})
        if option != "–":
            assert kind
            assert meaning
            own[option.strip("`")] = default
    return found


def options_of(owners: dict[str, type]) -> dict[str, dict[str, str]]:
    return {name: {f.name: str(getattr(own(), f.name)) for f in fields(own)} for name, own in owners.items()}


def test_every_method_is_described():
    rows = {row[0].strip("`"): row for row in rows_under("The methods")}
    assert list(rows) == list(PRUNERS)
    for name, pruner in PRUNERS.items():
        _, _, within, measured, pattern, _ = rows[name]
        assert within.split(",")[0] == pruner.within
        assert set(re.findall(r"`(\w+)`", measured)) == pruner.needs
        assert (pattern == "yes") == pruner.takes_pattern


def test_every_statistic_is_described():
    table = METHODS.read_text(encoding="utf-8").partition("| statistic |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == STATISTICS.keys()


@pytest.mark.parametrize(
    ("heading", "owners"),
    [
        ("Options of methods", {name: pruner.options for name, pruner in PRUNERS.items()}),
        ("Options of tasks", {name: task.options for name, task in TASKS.items()}),
        ("Options of model families", {name: get_family(name).adapter.options for name in FAMILIES}),
    ],
)
def test_every_option_is_described_with_its_default(heading, owners):
    assert options_under(heading) == options_of(owners)

import dataclasses
import io
import re
from pathlib import Path

import fake_pipeline
import pytest
from fake_pipeline import catalogue
from rich.console import Console

from vlprune.config import ConfigError
from vlprune.report import Options as ReportOptions
from vlprune.report import report
from vlprune.store.record import load_records
from vlprune.sweep.__main__ import Options, main, sweep

TABLE = """
[[grid]]
models = ["tiny-blip", "tiny-xvlm"]
methods = ["random", "omp", "lamp"]
sparsities = [0.63, 0.9]
tasks = ["retrieval", "captioning", "vqa"]
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(TABLE)
    return path


def go(options, run=fake_pipeline.run, terminal=False, check=fake_pipeline.check, devices=()):
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
    code = sweep(options, catalogue(), run, check, console, devices)
    return code, console.file.getvalue()


def test_a_sweep_prints_rows_and_tables_and_a_second_one_runs_nothing(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=2)
    code, text = go(options, fake_pipeline.run_noted)
    assert code == 0
    assert "quick: 42 runs, 0 done" in text
    assert "[42/42] tiny-" in text
    assert re.search(r"remaining \d+:\d\d", text)
    assert re.search(r"tiny-blip +omp +63 % +\d+\.\d +\d+\.\d +\d+\.\d\n", text)
    rows = re.findall(r"^(tiny-\w+) +(\w+) +(?:(\d+) %)? +\d", text, flags=re.MULTILINE)
    assert len(rows) == len(set(rows)) == 2 * (1 + 3 * 2)
    assert rows[0][1] == "dense"
    files = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert files == ["quick.csv", "quick.md", "quick_captioning.png", "quick_retrieval.png", "quick_vqa.png"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}

    code, again = go(options, fake_pipeline.run_noted)
    assert code == 0
    assert "quick: 42 runs, 42 done" in again
    tables = re.compile(r"^tiny-blip *$.*", flags=re.MULTILINE | re.DOTALL)
    assert tables.findall(again) == tables.findall(text) != []
    assert all(len(path.read_text().splitlines()) == 1 for path in (tmp_path / "notes").iterdir())
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == written


def test_a_sweep_publishes_variants_and_the_overlap_of_their_masks(tmp_path):
    path = tmp_path / "v.toml"
    entry = '[[grid]]\nmodels = ["tiny-blip"]\nmethods = [{}]\nsparsities = [0.5]\ntasks = ["vqa"]\n{}\n'
    path.write_text(
        entry.format('"omp", "chita++"', "") + entry.format('"chita++"', "calibration.alignment = 4\nseeds = [0, 1]")
    )
    options = Options(table=path, results=tmp_path, jobs=1)
    code, text = go(options, fake_pipeline.run_masked)
    assert code == 0
    assert "] tiny-blip chita++@50% alignment=1 vqa seed 0, " in text
    assert re.search(r"^tiny-blip  chita\+\+ alignment=4 +50 % +\d+\.\d$", text, flags=re.MULTILINE)
    names = [file.name for file in sorted((tmp_path / "tables").iterdir())]
    assert names == ["v.csv", "v.md", "v_overlap.csv", "v_overlap.png", "v_vqa.png"]
    assert "![overlap of the masks](v_overlap.png)" in (tmp_path / "tables" / "v.md").read_text()
    assert len((tmp_path / "tables" / "v_overlap.csv").read_text().splitlines()) == 1 + 6 * 3


def test_a_terminal_shows_a_bar(tmp_path, table):
    code, text = go(Options(table=table, results=tmp_path, jobs=1, methods="omp", models="tiny-blip"), terminal=True)
    assert code == 0
    assert "9/9" in text
    assert "[9/9]" not in text
    assert (tmp_path / "tables" / "quick-selection.md").exists()
    assert not (tmp_path / "tables" / "quick.md").exists()


def test_a_failed_run_is_named_at_the_end_and_tried_again(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=2, tasks="retrieval", models="tiny-blip")
    code, text = go(options, fake_pipeline.run_broken)
    assert code == 1
    last = text.strip().splitlines()[-1]
    assert re.fullmatch(r"failed: tiny-blip lamp@90% retrieval seed 0: RuntimeError: no luck \(.*/error.txt\)", last)
    assert "warning: tiny-blip omp@63% retrieval seed 0: cache damaged" in text
    assert re.search(r"tiny-blip +lamp +63 % +–\n", text)
    code, text = go(options)
    assert code == 0
    assert "7 runs, 5 done" in text
    assert "failed:" not in text


def test_every_run_measures_what_all_methods_of_the_table_need(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", sparsities="0.9")
    go(dataclasses.replace(options, methods="omp,snip,multiflow"), fake_pipeline.run_noted)
    assert {path.read_text().split()[3] for path in (tmp_path / "notes").iterdir()} == {"grad,input_sq"}


def test_what_runs_is_looked_at_once_before_anything_runs(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="omp")
    looked = []

    def refuse(configs):
        looked.extend(configs)
        raise ConfigError("cannot load model 'tiny-blip': no such tensor")

    with pytest.raises(ConfigError, match="cannot load model"):
        go(options, check=refuse)
    assert [config.pruning.method for config in looked] == ["dense", "omp", "omp"]
    assert not (tmp_path / "runs").exists()
    go(options)
    code, _ = go(options, check=refuse)  # nothing is left to run
    assert code == 0


def test_there_are_as_many_workers_as_devices(tmp_path, table):
    options = Options(table=table, results=tmp_path, tasks="vqa", methods="omp")
    go(options, fake_pipeline.run_noted, devices=("4", "6", "8"))
    notes = [path.read_text().split() for path in (tmp_path / "notes").iterdir()]
    assert len({note[0] for note in notes}) == len({note[2] for note in notes}) == 3


def test_an_error_ends_the_command_with_2(tmp_path, table, monkeypatch, capsys):
    table.write_text(TABLE.replace("tiny-blip", str(tmp_path)))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{")
    monkeypatch.setattr("sys.argv", ["sweep", str(table), "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot load model {str(tmp_path)!r}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_runs_may_have_processes_of_their_own(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="dense")
    code, text = go(options, fake_pipeline.run_with_child)
    assert code == 0, text


def test_a_dry_run_runs_nothing(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", sparsities="0.9")
    go(dataclasses.replace(options, methods="omp"))
    code, text = go(dataclasses.replace(options, methods="omp,lamp", dry_run=True), run=None)
    assert code == 0
    assert re.search(r"^done +tiny-blip omp@90% vqa seed 0$", text, flags=re.MULTILINE)
    assert re.search(r"^to run +tiny-blip lamp@90% vqa seed 0$", text, flags=re.MULTILINE)
    assert text.endswith("quick: 3 runs, 2 done\n")
    assert len(load_records(tmp_path)) == 2


def test_a_limited_sweep_has_tables_of_its_own(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="omp")
    go(options)
    code, text = go(dataclasses.replace(options, limit=6))
    assert code == 0
    assert "quick-limit-6: 3 runs, 0 done" in text
    assert {record.config.task.limit for record in load_records(tmp_path)} == {None, 6}
    assert (tmp_path / "tables" / "quick-limit-6-selection.md").exists()


@pytest.mark.parametrize("tasks", ["retrieval,vqa", "vqa"])
def test_runs_without_a_score_are_named_with_their_predictions(tmp_path, table, tasks):
    options = Options(table=table, results=tmp_path, jobs=1, tasks=tasks, models="tiny-blip", methods="omp")
    code, text = go(options, fake_pipeline.run_unscored)
    assert code == 0
    assert re.search(r"tiny-blip +omp +90 % .* –$", text, flags=re.MULTILINE)
    paths = re.findall(r"^not scored: tiny-blip .*vqa seed 0: (.*predictions.jsonl)$", text, flags=re.MULTILINE)
    assert len(paths) == 3
    assert all(Path(path).exists() for path in paths)
    assert ("quick-selection.md" in text) == (tasks != "vqa")


def test_images_that_were_left_out_are_listed_at_the_end(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="omp")
    _, text = go(options, check=lambda configs: ["list.json, item 3: no image [3].png", "list.json, item 5: cut short"])
    assert text.endswith(
        "left out 2 images that cannot be read:\n"
        "  list.json, item 3: no image [3].png\n  list.json, item 5: cut short\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "onp"}, "unknown method 'onp'; did you mean 'omp'"),
        ({"sparsities": "a"}, "--sparsities must be numbers separated by commas, got 'a'"),
        ({"sparsities": "75"}, "did you mean 0.75"),
        ({"seeds": "0.5"}, "--seeds must be numbers"),
        ({"tasks": ","}, "--tasks names nothing"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"loader_workers": -1}, "--loader-workers must be at least 0, got -1"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_runs(tmp_path, table, changes, message):
    with pytest.raises(ConfigError, match=message):
        go(dataclasses.replace(Options(table=table, results=tmp_path), **changes), run=None)
    assert not (tmp_path / "runs").exists()


def test_data_must_be_a_directory(tmp_path, table):
    with pytest.raises(ConfigError, match="--data must be a directory, there is no 'nowhere'"):
        go(Options(table=table, results=tmp_path, data=Path("nowhere")), run=None)


def test_a_damaged_record_is_run_again(tmp_path, table, caplog):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="omp")
    go(options)
    broken = next((tmp_path / "runs").glob("*/record.json"))
    broken.write_text(broken.read_text()[:50])
    code, text = go(options)
    assert code == 0
    assert "3 runs, 2 done" in text
    assert str(broken) in caplog.text
    assert len(load_records(tmp_path)) == 3


def test_the_quickstart_is_found_in_the_clone_or_missed_clearly(tmp_path, monkeypatch):
    import vlprune.sweep.catalogue

    monkeypatch.chdir(tmp_path)
    code, text = go(Options(results=tmp_path, dry_run=True), run=None)
    assert code == 0
    assert "quickstart: 114 runs, 0 done" in text
    monkeypatch.setattr(vlprune.sweep.catalogue, "__file__", str(tmp_path / "lib" / "vlprune" / "catalogue.py"))
    with pytest.raises(ConfigError, match=r"no experiments/quickstart.toml here; run this in a clone"):
        go(Options(results=tmp_path, dry_run=True), run=None)


def test_a_report_reads_records_only(tmp_path, table):
    with pytest.raises(ConfigError, match="none of the 42 runs of quick is done"):
        report(ReportOptions(table=table, results=tmp_path), catalogue())
    go(Options(table=table, results=tmp_path, jobs=2))
    text = report(ReportOptions(table=table, results=tmp_path), catalogue())
    assert text in (tmp_path / "tables" / "quick.md").read_text()
    csv = report(ReportOptions(table=table, results=tmp_path, format="csv"), catalogue())
    assert csv == (tmp_path / "tables" / "quick.csv").read_text()

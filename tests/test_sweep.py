import dataclasses
import io
import json
import re
from functools import partial
from pathlib import Path

import fake_pipeline
import pytest
from rich.console import Console

from vlprune.config import ConfigError
from vlprune.pipeline import chain
from vlprune.report import Options as ReportOptions
from vlprune.report import report
from vlprune.stages.fingerprints import Fingerprints
from vlprune.store.artifacts import Note, note_path, written
from vlprune.store.lease import claimed
from vlprune.store.record import load_records, predictions_path, read_record
from vlprune.store.verify import verify
from vlprune.sweep.__main__ import main
from vlprune.sweep.command import sweep
from vlprune.sweep.local import local_pool
from vlprune.sweep.options import Options
from vlprune.sweep.planner import Planner

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


class FakePlanner(Planner):
    """Plans, and finds that all can be loaded."""

    def __init__(self, check=None, devices=()):
        self._check, self._devices, self.plans = check, list(devices), 0

    def plan(self, options):
        self.plans += 1
        return super().plan(options)

    def check(self, configs, *, skip_broken):
        return [] if self._check is None else self._check(configs)

    def devices(self):
        return self._devices


ENDS = ("captioning.png", "results.csv", "retrieval.png", "vqa.png")


def go(options, work=fake_pipeline.work, terminal=False, check=None, devices=(), planner=None):
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
    planner = planner or FakePlanner(check, devices)
    code = sweep(options, planner, partial(local_pool, work), console)
    return code, console.file.getvalue()


def test_a_sweep_prints_rows_and_tables_and_a_second_one_runs_nothing(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=2)
    code, text = go(options, fake_pipeline.work_noted)
    assert code == 0
    assert "quick: 42 runs, 0 done" in text
    assert "[42/42] tiny-" in text
    assert re.search(r"remaining \d+:\d\d", text)
    assert re.search(r"tiny-blip +omp +63 % +\d+\.\d +\d+\.\d +\d+\.\d\n", text)
    rows = re.findall(r"^(tiny-\w+) +(\w+) +(?:(\d+) %)? +\d", text, flags=re.MULTILINE)
    assert len(rows) == len(set(rows)) == 2 * (1 + 3 * 2)
    assert rows[0][1] == "dense"
    files = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert files == [
        "quick.csv",
        "quick.md",
        *(f"quick_{end}" for end in ("captioning.png", "results.csv", "retrieval.png", "vqa.png")),
    ]
    written = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}

    code, again = go(options, fake_pipeline.work_noted)
    assert code == 0
    assert "quick: 42 runs, 42 done" in again
    tables = re.compile(r"^tiny-blip *$.*", flags=re.MULTILINE | re.DOTALL)
    assert tables.findall(again) == tables.findall(text) != []
    assert all(len(path.read_text().splitlines()) == 1 for path in (tmp_path / "notes").iterdir())
    assert not list((tmp_path / "runs").glob("*/error.txt"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == written


def test_a_sweep_publishes_variants_and_the_overlap_of_their_masks(tmp_path):
    path = tmp_path / "v.toml"
    entry = '[[grid]]\nmodels = ["tiny-blip"]\nmethods = [{}]\nsparsities = [0.5]\ntasks = ["vqa"]\n{}\n'
    path.write_text(
        entry.format('"omp", "chita++"', "") + entry.format('"chita++"', "calibration.alignment = 4\nseeds = [0, 1]")
    )
    options = Options(table=path, results=tmp_path, jobs=1)
    code, text = go(options, fake_pipeline.work_masked)
    assert code == 0
    assert "] tiny-blip chita++@50% alignment=1 vqa seed 0, " in text
    assert re.search(r"^tiny-blip  chita\+\+ alignment=4 +50 % +\d+\.\d$", text, flags=re.MULTILINE)
    names = [file.name for file in sorted((tmp_path / "tables").iterdir())]
    assert names == ["v.csv", "v.md", "v_overlap.csv", "v_overlap.png", "v_results.csv", "v_vqa.png"]
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
    code, text = go(options, fake_pipeline.work_broken)
    assert code == 1
    last = text.strip().splitlines()[-1]
    assert re.fullmatch(r"failed: tiny-blip lamp@90% retrieval seed 0: RuntimeError: no luck \(.*/error.txt\)", last)
    assert "warning: tiny-blip omp@63% retrieval seed 0: cache damaged" in text
    assert re.search(r"tiny-blip +lamp +63 % +–\n", text)
    code, text = go(options)
    assert code == 0
    assert "7 runs, 5 done" in text
    assert "failed:" not in text


def test_what_several_runs_share_is_made_once_before_them(tmp_path, table):
    options = Options(
        table=table, results=tmp_path, jobs=2, tasks="vqa,retrieval", models="tiny-blip", sparsities="0.9"
    )
    code, text = go(dataclasses.replace(options, methods="omp,snip,multiflow"), fake_pipeline.work_noted)
    assert code == 0, text
    notes = {path.name: path.read_text().split() for path in (tmp_path / "notes").iterdir()}
    shared = {name: note[3] for name, note in notes.items() if note[3] != "record"}
    assert shared == {
        "tiny-blip_statistics_seed_0": "statistics",
        "tiny-blip_omp_masks_at_90_%_seed_0": "masks",
        "tiny-blip_snip_masks_at_90_%_seed_0": "masks",
        "tiny-blip_multiflow_masks_at_90_%_seed_0": "masks",
    }
    assert all(len(note) == 4 for note in notes.values())


def test_runs_whose_statistics_fail_fail_with_them_and_the_others_go_on(tmp_path, table):
    options = Options(
        table=table, results=tmp_path, jobs=1, tasks="vqa,retrieval", models="tiny-blip", sparsities="0.9"
    )
    code, text = go(dataclasses.replace(options, methods="omp,multiflow"), fake_pipeline.work_broken)
    assert code == 1
    assert "failed: tiny-blip statistics seed 0: RuntimeError: no statistics" in text
    last = text.strip().splitlines()[-2:]
    assert all(
        "multiflow@90%" in line and "its statistics failed: RuntimeError: no statistics" in line for line in last
    )
    assert len(load_records(tmp_path)) == 4


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
    go(options, fake_pipeline.work_noted, devices=("4", "6", "8"))
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
    assert error.startswith(f"error: quick.toml: [[grid]] 1: {tmp_path / 'config.json'} ")
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_runs_may_have_processes_of_their_own(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="dense")
    code, text = go(options, fake_pipeline.work_with_child)
    assert code == 0, text


def test_a_dry_run_runs_nothing(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", sparsities="0.9")
    go(dataclasses.replace(options, methods="omp"))
    code, text = go(dataclasses.replace(options, methods="omp,lamp", dry_run=True), work=None)
    assert code == 0
    assert re.search(r"^done +tiny-blip omp@90% vqa seed 0$", text, flags=re.MULTILINE)
    assert re.search(r"^to run +tiny-blip lamp@90% vqa seed 0$", text, flags=re.MULTILINE)
    assert text.endswith("quick-selection: 3 runs, 2 done\n")
    assert len(load_records(tmp_path)) == 2


def test_a_limited_sweep_has_tables_of_its_own(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="vqa", models="tiny-blip", methods="omp")
    go(options)
    code, text = go(dataclasses.replace(options, limit=6))
    assert code == 0
    assert "quick-limit-6-selection: 3 runs, 0 done" in text
    assert {record.config.task.limit for record in load_records(tmp_path)} == {None, 6}
    assert (tmp_path / "tables" / "quick-limit-6-selection.md").exists()


@pytest.mark.parametrize("tasks", ["retrieval,vqa", "vqa"])
def test_runs_without_a_score_are_named_with_their_predictions(tmp_path, table, tasks):
    options = Options(table=table, results=tmp_path, jobs=1, tasks=tasks, models="tiny-blip", methods="omp")
    code, text = go(options, fake_pipeline.work_unscored)
    assert code == 0
    assert re.search(r"tiny-blip +omp +90 % .* –$", text, flags=re.MULTILINE)
    paths = re.findall(r"^not scored: tiny-blip .*vqa seed 0: (.*predictions/\w+.jsonl)$", text, flags=re.MULTILINE)
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
        go(dataclasses.replace(Options(table=table, results=tmp_path), **changes), work=None)
    assert not (tmp_path / "runs").exists()


def test_data_must_be_a_directory(tmp_path, table):
    with pytest.raises(ConfigError, match="--data must be a directory, there is no 'nowhere'"):
        go(Options(table=table, results=tmp_path, data=Path("nowhere")), work=None)


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
    import vlprune.sweep.options as module

    monkeypatch.chdir(tmp_path)
    code, text = go(Options(results=tmp_path, dry_run=True), work=None)
    assert code == 0
    assert "quickstart: 114 runs, 0 done" in text
    monkeypatch.setattr(module, "__file__", str(tmp_path / "lib" / "vlprune" / "sweep" / "options.py"))
    with pytest.raises(ConfigError, match=r"no experiments/quickstart.toml here; run this in a clone"):
        go(Options(results=tmp_path, dry_run=True), work=None)


def test_settings_of_the_command_line_win_and_multiply(tmp_path, table):
    few = {"tasks": "vqa", "models": "tiny-blip", "methods": "omp", "sparsities": "0.9"}
    options = Options(table=table, results=tmp_path, jobs=1, **few, set=("finetuning.lr=1e-4,5e-4", "seed=0,1"))
    code, text = go(options)
    assert code == 0, text
    assert "quick-selection-lr=1e-4,5e-4: 8 runs, 0 done" in text
    assert re.search(r"^tiny-blip +omp lr=0.0001 +90 % +\d+\.\d$", text, flags=re.MULTILINE)
    assert re.search(r"^tiny-blip +dense lr=0.0005 +\d+\.\d$", text, flags=re.MULTILINE)
    configs = [record.config for record in load_records(tmp_path)]
    assert {(config.finetuning.lr, config.seed) for config in configs} == {
        (lr, s) for lr in (1e-4, 5e-4) for s in (0, 1)
    }
    name = "quick-selection-lr=1e-4,5e-4"
    assert "omp lr=0.0005" in report(ReportOptions(table=name, results=tmp_path))
    go(dataclasses.replace(options, set=("task.test=val",)))
    assert any(record.config.task.test == "val" for record in load_records(tmp_path))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("finetuning.lr",), "--set takes NAME=VALUE"),
        (("finetuning.lrr=1",), "finetuning: unknown key 'lrr'; did you mean 'lr'"),
        (("lr=1",), "unknown setting 'lr'"),
        (("finetuning.lr=1", "finetuning.lr=2"), "--set finetuning.lr is given twice"),
        (("finetuning.lr=a",), "finetuning.lr must be a valid number, got 'a'"),
        (("pruning.sparsity=75",), "did you mean 0.75"),
        (("pruning.options.lam=1",), "unknown option 'lam'. There are: none"),
        (("task.options.beams=1",), "unknown option 'beams'; did you mean 'num_beams'"),
        (("task.options={k_test=3}",), "task.options is no setting but holds some: task.options.NAME"),
        (("pruning=1",), "pruning is no setting but holds some: pruning.method, "),
        (("finetuning.lr=,",), "finetuning.lr needs at least one value"),
        (("seed=1,1",), "seed names 1 twice"),
        (("seed=x",), "seed must be a valid integer, got 'x'"),
        ((f"seed={'1' * 5000}",), "seed must be a valid integer"),
        ((f"seed={'[' * 5000}",), "seed must be a valid integer"),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_runs(tmp_path, table, texts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        go(Options(table=table, results=tmp_path, set=texts), work=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_best_seed_of_each_row_keeps_its_weights(tmp_path, table):
    few = {"tasks": "vqa", "models": "tiny-blip", "methods": "omp", "sparsities": "0.9", "seeds": "0,1,2"}
    options = Options(table=table, results=tmp_path, jobs=1, **few, keep_weights="best")
    go(options)
    from vlprune.sweep.planner import plan
    from vlprune.sweep.table import load_table

    given = {"task.name": ["vqa"], "model.name": ["tiny-blip"], "pruning.method": ["omp"], "pruning.sparsity": [0.9]}
    planned = plan(load_table(table, {**given, "seed": [0, 1, 2]}), Fingerprints())
    for run in planned.runs:
        (tmp_path / run.tuned.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / run.tuned.file).touch()
    go(options)
    kept = [run for run in planned.runs if (tmp_path / run.tuned.file).exists()]
    records = {record.key: record for record in load_records(tmp_path)}
    pruned = [run for run in planned.runs if run.cell.config.pruning.method == "omp"]
    assert [run.cell.config.pruning.method for run in kept] == ["dense", "omp"]
    assert max(pruned, key=lambda run: records[run.key].metrics["accuracy"]) in kept


def test_weights_that_several_rows_share_stay_if_one_of_the_rows_is_the_best(tmp_path, table):
    table.write_text(TABLE + "task.options.k_test = [10, 11, 12]\n")
    few = {"tasks": "retrieval", "models": "tiny-blip", "methods": "omp", "sparsities": "0.9", "seeds": "0,1,2"}
    options = Options(table=table, results=tmp_path, jobs=1, **few, keep_weights="best")
    go(options)
    shared = {}  # {file of fine-tuned weights: records made with them}
    for record in load_records(tmp_path):
        path = chain(record.config, Fingerprints()).tuned.path(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        shared.setdefault(path, []).append(record)
    assert sorted(map(len, shared.values())) == [3] * 6
    go(options)
    best = {}
    for path, records in shared.items():
        for record in records:
            row = (
                record.config.pruning.method,
                record.config.task.options["k_test"] if record.config.task.options else 16,
            )
            best.setdefault(row, []).append((record.metrics["r_mean"], -record.config.seed, path))
    assert {path for path in shared if path.exists()} == {max(runs)[2] for runs in best.values()}


def test_a_sweep_that_cannot_go_on_stops_and_goes_on_when_it_can(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, models="tiny-blip")
    code, text = go(options, fake_pipeline.work_on_a_full_disk)
    assert code == 3
    assert "3 runs finished, 1 failed" in text
    assert re.search(
        r"^stopped: OSError: .*No space left on device: 'record.json'; .* GiB are free in .*; what is done is stored",
        text,
        re.M,
    )
    code, text = go(options, fake_pipeline.work_that_fails_alike)
    assert code == 3
    assert "stopped: the last 7 runs failed alike: RuntimeError: a library is broken" in text  # six of one method
    assert go(options)[0] == 0


def test_a_method_that_always_fails_stops_no_other(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, models="tiny-blip")
    code, text = go(options, fake_pipeline.work_of_broken_lamp)
    assert code == 1
    assert "15 runs finished, 6 failed" in text


def test_a_table_that_cannot_be_written_hides_no_failed_run(tmp_path, table):
    (tmp_path / "tables").write_text("a file where a directory should be")
    options = Options(table=table, results=tmp_path, jobs=1, models="tiny-blip", tasks="vqa")
    code, text = go(options, fake_pipeline.work_broken)
    assert code == 3
    assert "the table cannot be written" in text
    assert "failed: tiny-blip lamp@63% vqa seed 0: RuntimeError: no luck" in text


def test_shards_do_each_run_once_and_the_last_prints_the_whole_table(tmp_path, table):
    done = []
    for part in ("1/3", "2/3", "3/3"):
        code, text = go(Options(table=table, results=tmp_path, jobs=1, shard=part), fake_pipeline.work_noted)
        assert code == 0
        done.append(len(load_records(tmp_path)))
    assert done == [14, 28, 42]
    notes = [path.read_text().splitlines() for path in (tmp_path / "notes").iterdir()]
    assert sum(lines[0].endswith("record") for lines in notes) == 42
    assert all(len(lines) == 1 for lines in notes if lines[0].endswith("record"))
    assert "42 runs, 28 done" in text
    code, whole = go(Options(table=table, results=tmp_path, jobs=1))
    tables = re.compile(r"^tiny-blip *$.*", flags=re.MULTILINE | re.DOTALL)
    assert tables.findall(text) == tables.findall(whole) != []
    for wrong in ("3", "0/3", "4/3", "a/b", "1/"):
        with pytest.raises(ConfigError, match="--shard must be K/N"):
            go(Options(table=table, results=tmp_path, shard=wrong))


def test_only_what_failed_is_tried_again_where_that_is_asked_for(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=2, tasks="retrieval", models="tiny-blip")
    go(options, fake_pipeline.work_broken)
    for path in (tmp_path / "runs").glob("*/record.json"):  # another run is not done, and did not fail
        path.unlink()
        break
    code, text = go(dataclasses.replace(options, retry_failed=True))
    assert code == 0
    assert "7 runs, 4 done, 2 of the others to run" in text
    code, text = go(options)
    assert "7 runs, 6 done" in text


def test_the_status_says_what_is_done_who_works_on_what_and_what_failed(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=2, tasks="retrieval", models="tiny-blip")
    code, text = go(dataclasses.replace(options, status=True))
    assert code == 0
    assert text == "quick-selection: 7 runs, 0 done, 0 running, 0 failed, 7 to run\n"
    go(options, fake_pipeline.work_broken)
    [first] = list((tmp_path / "runs").glob("*/record.json"))[:1]
    first.unlink()
    with claimed([first]):
        code, text = go(dataclasses.replace(options, status=True))
    lines = text.splitlines()
    assert lines[0] == "quick-selection: 7 runs, 4 done, 1 running, 2 failed, 0 to run"
    assert re.fullmatch(r"running  tiny-blip .* retrieval seed 0: .* \(process \d+ on .*, 0:00\)", lines[1])
    assert re.fullmatch(r"failed   tiny-blip lamp@63% .*: RuntimeError: no luck \(.*error.txt\)", lines[2])
    assert not list(tmp_path.rglob("*.lease"))


def test_a_table_that_mixes_says_so(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="retrieval", models="tiny-blip", methods="omp")
    _, text = go(options)
    assert "made alike" not in text
    path = next((tmp_path / "runs").glob("*/record.json"))
    record = json.loads(path.read_text())
    record["origins"]["record"]["versions"]["torch"] = "1.0"
    record["origins"]["record"]["device"] = "<another>"
    with written(path, Note()) as half:
        half.write_text(json.dumps(record))
    _, text = go(options)
    for part in (
        "Not all 3 runs were made alike: device ",
        "<another> (1 run)",
        "; torch ",
        "2 (2 runs)",
        "1.0 (1 run)",
    ):
        assert part in text
    assert "made alike" in (tmp_path / "tables" / "quick-selection.md").read_text()
    html = report(ReportOptions(table="quick-selection", results=tmp_path, format="html"))
    assert "&lt;another&gt;" in html


def test_every_file_of_results_is_verified(tmp_path, table):
    options = Options(table=table, results=tmp_path, jobs=1, tasks="retrieval", models="tiny-blip", methods="omp")
    go(options)
    runs = sorted((tmp_path / "runs").glob("*/record.json"))
    for path in runs:  # of fake work, which stores no predictions
        predictions = predictions_path(tmp_path, read_record(path.parent))
        with written(predictions, Note()) as half:
            half.write_text("{}")
    assert verify(tmp_path).faults == ()
    assert verify(tmp_path).intact == {"runs": 3, "predictions": 3}
    faults = [
        (lambda path: path.write_text(path.read_text() + " "), "not the file that its note describes"),
        (lambda path: note_path(path).unlink(), "its note is missing"),
        (lambda path: note_path(path).write_text("{}"), "its note is damaged"),
        (lambda path: path.unlink(), "it is gone"),
    ]
    for spoil, message in faults:
        before = {path: path.read_bytes() for path in (runs[0], note_path(runs[0]))}
        spoil(runs[0])
        [fault] = verify(tmp_path).faults
        assert str(runs[0]) in fault
        assert message in fault
        for path, content in before.items():
            path.write_bytes(content)
    predictions.write_text("{ }")
    assert "not the file" in verify(tmp_path).faults[0]
    with pytest.raises(FileNotFoundError, match="no results directory"):
        verify(tmp_path / "none")


def test_a_report_takes_what_a_sweep_takes(tmp_path, table):
    """The runs of a table, of one of its selections, and of both together; another limit is another table."""
    whole = Options(table=table, results=tmp_path, jobs=2, tasks="retrieval", models="tiny-blip")
    go(whole)
    asked = ReportOptions(table="quick", results=tmp_path, tasks="retrieval", models="tiny-blip")
    text = report(asked)
    assert text in (tmp_path / "tables" / "quick-selection.md").read_text()
    assert report(dataclasses.replace(asked, set=("task.name=retrieval",), tasks=None)) == text
    methods = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert {"omp", "lamp"} <= {*methods}
    fewer = report(dataclasses.replace(asked, methods="omp"))
    assert "| omp" in fewer
    assert "| dense" in fewer
    assert "| lamp" not in fewer
    with pytest.raises(ConfigError, match=r"^quick-selection: unknown seed '7'\. There are: 0"):
        report(dataclasses.replace(asked, seeds="7"))
    with pytest.raises(ConfigError, match=r"no sweep of table 'quick-limit-9' in .* There are: quick-selection$"):
        report(ReportOptions(table="quick", results=tmp_path, limit=9))
    with pytest.raises(ConfigError, match="--set takes NAME=VALUE"):
        report(dataclasses.replace(asked, set=("x",)))
    # Another selection takes the place of the file of the first, whose runs are known by the whole table alone.
    go(dataclasses.replace(whole, tasks="vqa", seeds="0,1"))
    assert report(dataclasses.replace(asked, tasks="vqa", seeds="1")).count("1 seed.") == 1


def test_a_report_reads_the_results_directory_alone(tmp_path, table):
    with pytest.raises(ConfigError, match="no sweep of table 'quick' in "):
        report(ReportOptions(table="quick", results=tmp_path / "results"))
    go(Options(table=table, results=tmp_path / "results", jobs=2))
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    table.unlink()
    options = ReportOptions(table="quick", results=tmp_path / "elsewhere")
    text = report(options)
    assert text in (tmp_path / "elsewhere" / "tables" / "quick.md").read_text()
    assert report(dataclasses.replace(options, table="some/where/quick.toml")) == text
    csv = report(dataclasses.replace(options, format="csv"))
    assert csv == (tmp_path / "elsewhere" / "tables" / "quick.csv").read_text()
    for path in (tmp_path / "elsewhere" / "runs").glob("*/record.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="none of the 42 runs of quick is done"):
        report(options)

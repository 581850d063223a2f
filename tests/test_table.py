from dataclasses import replace

import pytest
from fake_pipeline import catalogue

from vlprune.config import ConfigError, PruningConfig, RunConfig, variant
from vlprune.store.keys import run_key
from vlprune.sweep.table import Selection, load_table

TABLE = """
[base.finetuning]
steps = 10
lr = 1
[base.task]
limit = 5
[task.vqa]
finetuning.steps = 48
task.limit = 6
[[grid]]
models = ["tiny-blip", "tiny-xvlm"]
methods = ["omp", "snip"]
sparsities = [0.63, 0.9]
tasks = ["retrieval", "vqa"]
[[grid]]
models = ["tiny-blip"]
methods = ["chita++"]
sparsities = [0.9]
tasks = ["vqa"]
calibration.steps = 7
"""
GRID = 'models = ["tiny-blip"]\nmethods = ["omp"]\nsparsities = [0.9]\ntasks = ["vqa"]\n'


def load(tmp_path, text, selection=None, data=None):
    path = tmp_path / "t.toml"
    path.write_text(text)
    return load_table(path, catalogue(), selection, data)


def test_lists_multiply_and_the_dense_run_is_there_once(tmp_path):
    table = load(tmp_path, TABLE)
    places = [cell.place for cell in table.cells]
    assert table.name == "t"
    assert len(places) == len(set(places)) == 2 * 2 * (1 + 2 * 2) + 1
    assert places.count(("tiny-blip", "dense", "", 0.0, "vqa", 0)) == 1
    assert len({cell.key for cell in table.cells}) == len(places)


def test_settings_of_task_and_entry_win_over_base(tmp_path):
    configs = {cell.place: cell.config for cell in load(tmp_path, TABLE).cells}
    retrieval = configs["tiny-xvlm", "omp", "", 0.63, "retrieval", 0]
    vqa = configs["tiny-xvlm", "omp", "", 0.63, "vqa", 0]
    assert (retrieval.finetuning.steps, retrieval.task.limit, retrieval.finetuning.lr) == (10, 5, 1.0)
    assert (vqa.finetuning.steps, vqa.task.limit, vqa.calibration.steps) == (48, 6, 4)
    assert configs["tiny-blip", "chita++", "steps=7", 0.9, "vqa", 0].calibration.steps == 7


def test_a_selection_replaces_axes(tmp_path):
    cells = load(tmp_path, TABLE, Selection(methods=("omp", "chita++"), models=("tiny-blip",), seeds=(1, 2))).cells
    rows = {(cell.config.pruning.method, cell.config.pruning.sparsity) for cell in cells}
    assert rows == {("dense", 0.0), ("omp", 0.63), ("omp", 0.9), ("chita++", 0.9)}
    assert {cell.config.seed for cell in cells} == {1, 2}
    assert {cell.config.model for cell in cells} == {"tiny-blip"}
    new = load(tmp_path, TABLE, Selection(methods=("lamp",), models=("tiny-xvlm",))).cells
    assert {cell.config.pruning.method for cell in new} == {"dense", "lamp"}


def test_only_the_dense_model(tmp_path):
    text = '[[grid]]\nmodels = ["tiny-blip"]\nmethods = ["dense"]\ntasks = ["vqa"]\nseeds = [0, 1]\n'
    assert [cell.config.seed for cell in load(tmp_path, text).cells] == [0, 1]


def test_data_is_a_directory_for_the_task_and_for_calibration_if_none_is_named(tmp_path):
    cell = load(tmp_path, "[[grid]]\n" + GRID, data=str(tmp_path)).cells[-1]
    assert cell.config.calibration.data == cell.config.task.data == str(tmp_path)
    text = "[base.calibration]\ndata = 'scenes'\n[[grid]]\n" + GRID
    cell = load(tmp_path, text, data=str(tmp_path)).cells[-1]
    assert (cell.config.calibration.data, cell.config.task.data) == ("scenes", str(tmp_path))
    with pytest.raises(ConfigError, match=r"grid\]\] 1: unknown data set '/no'. There are: scenes"):
        load(tmp_path, "[[grid]]\n" + GRID, data="/no")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bas]\n", "unknown key 'bas'; did you mean 'base'"),
        ("[base]\nfinetune.steps = 3\n", "unknown key 'finetune'; did you mean 'finetuning'"),
        ("[base.finetuning]\nstep = 3\n", r"\[base\]: finetuning: unknown key 'step'; did you mean 'steps'"),
        ("[base.finetuning]\nsteps = 'a'\n", "finetuning.steps must be int, got 'a'"),
        ("[base.task]\nname = 'vqa'\n", "task.name is set by the list 'tasks'"),
        ("[task.vqq]\n", "unknown task 'vqq'; did you mean 'vqa'"),
        ("base = 3\n", "must be a table, got 3"),
        ("x = \n", "not valid TOML"),
        ("", r"at least one \[\[grid\]\]"),
        ("[[grid]]\nmodels = ['tiny-blip']\n", "the list 'methods' is missing"),
        ("[[grid]]\nmodel = ['tiny-blip']\n", "unknown key 'model'; did you mean 'models'"),
        ("[[grid]]\n" + GRID.replace('["omp"]', '"omp"'), "methods must be a list"),
        ("[[grid]]\n" + GRID.replace("omp", "onp"), "unknown method 'onp'; did you mean 'omp'"),
        ("[[grid]]\n" + GRID.replace("blip", "blib"), "unknown model 'tiny-blib'; did you mean 'tiny-blip'"),
        ("[[grid]]\n" + GRID.replace("vqa", "vqas"), "unknown task 'vqas'; did you mean 'vqa'"),
        ("[[grid]]\n" + GRID.replace("0.9", "90"), r"sparsity must be in \[0, 1\).*did you mean 0.9"),
        ("[[grid]]\n" + GRID.replace("0.9", "'a'"), "a sparsity must be a number"),
        ("[[grid]]\nseeds = [-1]\n" + GRID, "a seed must be"),
        (
            "[[grid]]\n" + GRID.replace("tiny-blip", "org/name"),
            "unknown model 'org/name'. There are: tiny-blip",
        ),
        ("[base.task]\nmax_length = 3\n[[grid]]\n" + GRID, "task.max_length must be at least min_length = 5, got 3"),
        ("[[grid]]\n" + GRID + "[[grid]]\nfinetuning.steps = 9\n" + GRID, "finetuning.steps is 40 in one and 9 in the"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no table '.*none.toml'"):
        load_table(tmp_path / "none.toml", catalogue())


def test_ranges_hold_for_the_merged_settings_only(tmp_path):
    text = "[base.task]\nmax_length = 50\n[task.vqa]\ntask.min_length = 35\n[[grid]]\n" + GRID
    task = load(tmp_path, text).cells[-1].config.task
    assert (task.min_length, task.max_length) == (35, 50)


def test_what_cannot_be_read_is_one_line(tmp_path):
    def contents(config):
        raise OSError(13, "Permission denied", "weights.bin")

    path = tmp_path / "t.toml"
    path.write_text("[[grid]]\n" + GRID)
    with pytest.raises(ConfigError, match=r"grid\]\] 1: .* cannot be read: .*Permission denied: 'weights.bin'"):
        load_table(path, replace(catalogue(), contents=contents))


def test_data_below_the_data_directory(tmp_path):
    for name in ("coco", "vqa", "web"):
        (tmp_path / name).mkdir()
    text = """
[base.calibration]
data = "{data}/web"
[task.retrieval]
task.data = "{data}/coco"
[task.vqa]
task.data = "{data}/vqa"
[[grid]]
models = ["tiny-blip"]
methods = ["omp"]
sparsities = [0.9]
tasks = ["retrieval", "vqa"]
"""
    cells = load(tmp_path, text, data=str(tmp_path)).cells
    places = {cell.config.task.name: (cell.config.task.data, cell.config.calibration.data) for cell in cells}
    web = str(tmp_path / "web")
    assert places == {"retrieval": (str(tmp_path / "coco"), web), "vqa": (str(tmp_path / "vqa"), web)}
    with pytest.raises(ConfigError, match=r"calibration.data is '\{data\}/web': give the directory with --data DIR"):
        load(tmp_path, text)


def test_a_directory_of_all_tasks_below_the_data_directory_stays_one(tmp_path):
    (tmp_path / "photos").mkdir()
    base = '[base]\ntask.data = "{data}/photos"\n'
    grid = '[[grid]]\nmodels = ["tiny-blip"]\nmethods = ["omp"]\nsparsities = [0.9]\ntasks = ["retrieval"]\n'
    for text, wanted in ((base + grid, tmp_path / "photos"), (grid, tmp_path)):
        assert {cell.config.task.data for cell in load(tmp_path, text, data=str(tmp_path)).cells} == {str(wanted)}


def test_a_limited_table_has_another_name_and_other_runs(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(TABLE)
    whole, few = load_table(path, catalogue()), load_table(path, catalogue(), limit=4)
    assert few.name == "t-limit-4"
    assert {(cell.config.task.limit, cell.config.calibration.batch_size) for cell in few.cells} == {(4, 2)}
    assert not {cell.key for cell in whole.cells} & {cell.key for cell in few.cells}
    chita = next(cell for cell in few.cells if cell.config.pruning.method == "chita++")
    assert (chita.config.calibration.steps, chita.config.calibration.step_batches) == (2, 1)


VARIANTS = """
[[grid]]
models = ["tiny-xvlm"]
methods = ["chita++", "omp"]
sparsities = [0.5]
tasks = ["vqa"]

[[grid]]
models = ["tiny-xvlm"]
methods = ["chita++"]
sparsities = [0.5]
tasks = ["vqa"]
calibration.alignment = 4
pruning.lam = 0.1

[[grid]]
models = ["tiny-xvlm"]
methods = ["omp"]
sparsities = [0.5]
tasks = ["vqa"]
pruning.pattern = "2:4"
"""


def test_a_method_may_be_there_in_several_variants_and_the_dense_run_once(tmp_path):
    cells = load(tmp_path, VARIANTS).cells
    assert [(cell.row[1], cell.row[2]) for cell in cells] == [
        ("dense", ""),
        ("chita++", ""),
        ("omp", ""),
        ("chita++", "alignment=4 lam=0.1"),
        ("omp", "pattern=2:4"),
    ]
    assert len({cell.key for cell in cells}) == 5
    assert [str(cell) for cell in cells] == [
        "tiny-xvlm dense vqa seed 0",
        "tiny-xvlm chita++@50% alignment=1 vqa seed 0",
        "tiny-xvlm omp@50% vqa seed 0",
        "tiny-xvlm chita++@50% alignment=4 lam=0.1 vqa seed 0",
        "tiny-xvlm omp@50% pattern=2:4 vqa seed 0",
    ]


def test_one_variant_is_called_by_its_method(tmp_path):
    cells = load(tmp_path, "[base.calibration]\nalignment = 4\n[base.pruning]\nlam = 3\n[[grid]]\n" + GRID).cells
    assert cells[1].row == ("tiny-blip", "omp", "alignment=4 lam=3", 0.9)
    assert [cell.label for cell in cells] == ["dense", "omp"]


def test_a_dense_run_is_the_same_one_under_every_calibration_and_pruning(tmp_path):
    plain = load(tmp_path, "[[grid]]\n" + GRID).cells[0]
    text = "calibration.alignment = 4\npruning = {pattern = '2:4', lam = 0.1}\n"
    other = load(tmp_path, "[[grid]]\n" + GRID.replace("0.9", "0.5") + text).cells
    assert other[0].key == plain.key
    assert (variant(other[0].config), variant(other[1].config)) == ("", "alignment=4 pattern=2:4 lam=0.1")
    config = RunConfig(pruning=PruningConfig(lam=0.1, pattern="2:4"))
    assert run_key(config, plain.contents) == run_key(RunConfig(), plain.contents)


def test_calibration_data_counts_by_the_name_of_its_directory(tmp_path):
    (tmp_path / "my photos").mkdir()
    text = f"calibration.data = '{tmp_path / 'my photos'}/'\n"
    cells = load(tmp_path, "[[grid]]\n" + GRID + "[[grid]]\n" + GRID + text).cells
    assert [str(cell) for cell in cells[1:]] == [
        "tiny-blip omp@90% data=scenes vqa seed 0",
        "tiny-blip omp@90% data=my photos vqa seed 0",
    ]


def test_settings_that_a_method_does_not_have_are_refused_with_the_entry(tmp_path):
    with pytest.raises(ConfigError, match=r"\[\[grid\]\] 3: method 'chita\+\+' takes no pattern"):
        load(
            tmp_path,
            VARIANTS.replace(
                '"omp"]\nsparsities = [0.5]\ntasks = ["vqa"]\npruning',
                '"chita++"]\nsparsities = [0.5]\ntasks = ["vqa"]\npruning',
            ),
        )
    with pytest.raises(ConfigError, match=r"the sparsity of pattern 1:4 must be 0\.75, got 0\.5"):
        load(tmp_path, VARIANTS.replace("2:4", "1:4"))

import pytest

from vlprune.config import CalibrationConfig, ConfigError, Options, PruningConfig, RunConfig, TaskConfig
from vlprune.stages.fingerprints import Fingerprints
from vlprune.sweep.given import parse_set
from vlprune.sweep.planner import plan
from vlprune.sweep.table import limited, load_table

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
pruning.options.steps = 7
"""
GRID = 'models = ["tiny-blip"]\nmethods = ["omp"]\nsparsities = [0.9]\ntasks = ["vqa"]\n'


SNIP = GRID.replace("omp", "snip")  # a method that reads the calibration data


def load(tmp_path, text, given=None, data=None):
    path = tmp_path / "t.toml"
    path.write_text(text)
    return load_table(path, given, data)


def planned(table):
    return plan(table, Fingerprints())


def test_lists_multiply_and_the_dense_run_is_there_once(tmp_path):
    table = load(tmp_path, TABLE)
    places = [cell.place for cell in table.cells]
    assert table.name == "t"
    assert len(places) == len(set(places)) == 2 * 2 * (1 + 2 * 2) + 1
    assert places.count(("tiny-blip", "dense", "", 0.0, "vqa", 0)) == 1
    assert len(planned(table).by_key) == len(places)


def test_settings_of_task_and_entry_win_over_base(tmp_path):
    configs = {cell.place: cell.config for cell in load(tmp_path, TABLE).cells}
    retrieval = configs["tiny-xvlm", "omp", "", 0.63, "retrieval", 0]
    vqa = configs["tiny-xvlm", "omp", "", 0.63, "vqa", 0]
    assert (retrieval.finetuning.steps, retrieval.task.limit, retrieval.finetuning.lr) == (10, 5, 1.0)
    assert (vqa.finetuning.steps, vqa.task.limit, dict(vqa.pruning.options)) == (48, 6, {})
    assert configs["tiny-blip", "chita++", "steps=7", 0.9, "vqa", 0].pruning.options == {"steps": 7}


def test_a_selection_replaces_axes(tmp_path):
    cells = load(
        tmp_path, TABLE, {"pruning.method": ["omp", "chita++"], "model.name": ["tiny-blip"], "seed": [1, 2]}
    ).cells
    rows = {(cell.config.pruning.method, cell.config.pruning.sparsity) for cell in cells}
    assert rows == {("dense", 0.0), ("omp", 0.63), ("omp", 0.9), ("chita++", 0.9)}
    assert {cell.config.seed for cell in cells} == {1, 2}
    assert {cell.config.model.name for cell in cells} == {"tiny-blip"}
    new = load(tmp_path, TABLE, {"pruning.method": ["lamp"], "model.name": ["tiny-xvlm"]}).cells
    assert {cell.config.pruning.method for cell in new} == {"dense", "lamp"}


def test_only_the_dense_model(tmp_path):
    text = '[[grid]]\nmodels = ["tiny-blip"]\nmethods = ["dense"]\ntasks = ["vqa"]\nseeds = [0, 1]\n'
    assert [cell.config.seed for cell in load(tmp_path, text).cells] == [0, 1]


def test_data_is_a_directory_for_the_task_and_for_calibration_if_none_is_named(tmp_path):
    cell = load(tmp_path, "[[grid]]\n" + SNIP, data=str(tmp_path)).cells[-1]
    assert cell.config.calibration.data == cell.config.task.data == str(tmp_path)
    text = "[base.calibration]\ndata = 'scenes'\n[[grid]]\n" + SNIP
    cell = load(tmp_path, text, data=str(tmp_path)).cells[-1]
    assert (cell.config.calibration.data, cell.config.task.data) == ("scenes", str(tmp_path))
    with pytest.raises(ConfigError, match=r"grid\]\] 1: unknown data set '/no'. There are: scenes"):
        planned(load(tmp_path, "[[grid]]\n" + SNIP, data="/no"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bas]\n", "unknown key 'bas'; did you mean 'base'"),
        ("[base]\nfinetune.steps = 3\n", "unknown key 'finetune'; did you mean 'finetuning'"),
        ("[base.finetuning]\nstep = 3\n", r"\[base\]: finetuning: unknown key 'step'; did you mean 'steps'"),
        ("[base.finetuning]\nsteps = 'a'\n", "finetuning.steps must be a valid integer, got 'a'"),
        ("[base.task]\nname = 'vqa'\n", "task.name is set by the list 'tasks'"),
        ("[task.vqq]\n", "unknown task 'vqq'; did you mean 'vqa'"),
        ("base = 3\n", "must be a table, got 3"),
        ("x = \n", "not valid TOML"),
        (f"x = {'1' * 5000}\n", "not valid TOML: a whole number has more digits than can be read"),
        (f"x = {'[' * 5000}\n", "not valid TOML: lists are nested too deeply"),
        ("", r"at least one \[\[grid\]\]"),
        ("[[grid]]\nmodels = ['tiny-blip']\n", "the list 'methods' is missing"),
        ("[[grid]]\nmodel = ['tiny-blip']\n", "unknown key 'model'; did you mean 'models'"),
        ("[[grid]]\n" + GRID.replace('["omp"]', '"omp"'), "methods must be a list"),
        ("[[grid]]\n" + GRID.replace("omp", "onp"), "unknown method 'onp'; did you mean 'omp'"),
        ("[[grid]]\n" + GRID.replace("vqa", "vqas"), "unknown task 'vqas'; did you mean 'vqa'"),
        ("[[grid]]\n" + GRID.replace("0.9", "90"), r"sparsity must be in \[0, 1\).*did you mean 0.9"),
        ("[[grid]]\n" + GRID.replace("0.9", "'a'"), "a sparsity must be a number"),
        ("[[grid]]\nseeds = [-1]\n" + GRID, "seed must be at least 0, got -1"),
        ("[base.task]\noptions.max_length = 3\n[[grid]]\n" + GRID, "unknown option 'max_length'. There are: k_test"),
        ("[base.pruning]\noptions.lam = 3\n[[grid]]\n" + GRID, "unknown option 'lam'. There are: none"),
        ("[method.onp]\n", "unknown method 'onp'; did you mean 'omp'"),
        ("[method.omp]\npruning.option.lam = 1\n", "unknown key 'option'; did you mean 'options'"),
        ("[[grid]]\nfinetuning.lr = []\n" + GRID, "finetuning.lr needs at least one value"),
        ("[[grid]]\nfinetuning.lr = [1e-4, 0.0001]\n" + GRID, "finetuning.lr names 0.0001 twice"),
        ("[[grid]]\nseeds = [1, 1]\n" + GRID, "seeds names 1 twice"),
        ("[[grid]]\n" + GRID + "[[grid]]\nfinetuning.steps = 9\n" + GRID, "finetuning.steps is 40 in one and 9 in the"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"grid\]\] 1: unknown model 'tiny-blib'; did you mean 'tiny-blip'"):
        planned(load(tmp_path, "[[grid]]\n" + GRID.replace("blip", "blib")))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no table '.*none.toml'"):
        load_table(tmp_path / "none.toml")


def test_ranges_hold_for_the_merged_settings_only(tmp_path):
    grid = "[[grid]]\n" + GRID.replace("vqa", "captioning")
    text = "[base.task]\noptions.max_length = 3\n[task.captioning]\ntask.options.min_length = 2\n" + grid
    options = load(tmp_path, text).cells[-1].config.task.options
    assert dict(options) == {"max_length": 3, "min_length": 2}


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def fingerprint(name):
        raise OSError(13, "Permission denied", "weights.bin")

    monkeypatch.setattr("vlprune.stages.fingerprints.take_model_fingerprint", fingerprint)
    with pytest.raises(ConfigError, match=r"grid\]\] 1: .* cannot be read: .*Permission denied: 'weights.bin'"):
        planned(load(tmp_path, "[[grid]]\n" + GRID))


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
methods = ["snip"]
sparsities = [0.9]
tasks = ["retrieval", "vqa"]
"""
    cells = load(tmp_path, text, data=str(tmp_path)).cells
    places = {cell.config.task.name: (cell.config.task.data, cell.config.calibration.data) for cell in cells}
    web = str(tmp_path / "web")
    assert places == {"retrieval": (str(tmp_path / "coco"), web), "vqa": (str(tmp_path / "vqa"), web)}
    with pytest.raises(ConfigError, match=r"task.data is '\{data\}/coco': give the directory with --data DIR"):
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
    whole, few = load_table(path), load_table(path, limit=4)
    assert few.name == "t-limit-4"
    assert {cell.config.task.limit for cell in few.cells} == {4}
    assert {c.config.calibration.batch_size for c in few.cells if c.config.pruning.method != "dense"} == {2}
    assert not planned(whole).by_key.keys() & planned(few).by_key.keys()
    chita = next(cell for cell in few.cells if cell.config.pruning.method == "chita++")
    assert dict(chita.config.pruning.options) == {"steps": 2, "step_batches": 1}


@pytest.mark.parametrize(
    ("limit", "batch_size", "n_batches", "steps", "step_batches"),
    [(1, 2, 1, 1, 1), (4, 2, 2, 2, 1), (64, 32, 2, 2, 1), (1000, 32, 31, 31, 1), (10**6, 32, 3000, 60, 50)],
)
def test_a_limited_run_calibrates_on_about_as_many_pairs(limit, batch_size, n_batches, steps, step_batches):
    options = Options(steps=60, step_batches=50)
    whole = RunConfig(
        calibration=CalibrationConfig(n_batches=3000), pruning=PruningConfig("itersnip", 0.5, None, options)
    )
    own = limited(whole, limit)
    assert own.task.limit == limit
    assert (own.calibration.batch_size, own.calibration.n_batches) == (batch_size, n_batches)
    assert {"steps": 4, "step_batches": 4, **own.pruning.options} == {"steps": steps, "step_batches": step_batches}
    assert limited(RunConfig(task=TaskConfig(limit=3)), limit).task.limit == min(3, limit)


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
pruning.options.lam = 0.1

[[grid]]
models = ["tiny-xvlm"]
methods = ["omp"]
sparsities = [0.5]
tasks = ["vqa"]
pruning.pattern = "2:4"
"""


def test_a_method_may_be_there_in_several_variants_and_the_dense_run_once(tmp_path):
    table = load(tmp_path, VARIANTS)
    assert [(cell.row[1], cell.row[2]) for cell in table.cells] == [
        ("dense", ""),
        ("chita++", ""),
        ("omp", ""),
        ("chita++", "alignment=4 lam=0.1"),
        ("omp", "pattern=2:4"),
    ]
    assert len(planned(table).by_key) == 5
    assert [str(cell) for cell in table.cells] == [
        "tiny-xvlm dense vqa seed 0",
        "tiny-xvlm chita++@50% alignment=1 lam=0.01 vqa seed 0",
        "tiny-xvlm omp@50% vqa seed 0",
        "tiny-xvlm chita++@50% alignment=4 lam=0.1 vqa seed 0",
        "tiny-xvlm omp@50% pattern=2:4 vqa seed 0",
    ]


def test_a_list_in_an_entry_multiplies(tmp_path):
    text = "[[grid]]\n" + GRID.replace("omp", "chita") + "pruning.options.lam = [1e-3, 0.01, 1]\n"
    cells = load(tmp_path, text).cells
    assert [cell.row[2] for cell in cells] == ["", "lam=0.001", "", "lam=1"]
    assert [cell.label for cell in cells] == ["dense", "chita lam=0.001", "chita lam=0.01", "chita lam=1"]
    text = "[[grid]]\n" + GRID + "finetuning.lr = [1e-4, 5e-4]\nfinetuning.betas = [0.9, 0.95]\n"
    cells = load(tmp_path, text).cells
    assert [cell.label for cell in cells] == ["dense lr=0.0001", "dense lr=0.0005", "omp lr=0.0001", "omp lr=0.0005"]
    assert {cell.config.finetuning.betas for cell in cells} == {(0.9, 0.95)}
    text = "[[grid]]\n" + GRID + "finetuning.betas = [[0.9, 0.95], [0.9, 0.999]]\n"
    assert {cell.config.finetuning.betas for cell in load(tmp_path, text).cells} == {(0.9, 0.95), (0.9, 0.999)}


def test_two_axes_of_one_last_name_stay_apart(tmp_path):
    text = GRID.replace("omp", "snip") + "finetuning.batch_size = [8, 16]\ncalibration.batch_size = [4, 6]\n"
    cells = load(tmp_path, "[[grid]]\n" + text).cells
    assert len({cell.place for cell in cells}) == len(cells) == 2 + 4
    assert len({cell.label for cell in cells}) == 6


def test_settings_of_a_method_go_before_base_and_behind_the_entry(tmp_path):
    text = """
[method.chita]
pruning.options.lam = 0.5
[method."chita++"]
pruning.options = {lam = 0.25, steps = 2}
"""
    grid = "[[grid]]\n" + GRID.replace('"omp"', '"omp", "chita", "chita++"')
    found = {
        cell.config.pruning.method: dict(cell.config.pruning.options) for cell in load(tmp_path, text + grid).cells
    }
    assert found == {"dense": {}, "omp": {}, "chita": {"lam": 0.5}, "chita++": {"lam": 0.25, "steps": 2}}
    own = text + "[[grid]]\n" + GRID.replace("omp", "chita++") + "pruning.options.lam = 1\n"
    assert dict(load(tmp_path, own).cells[-1].config.pruning.options) == {"lam": 1.0, "steps": 2}


def test_settings_that_a_method_does_not_read_make_no_variant(tmp_path):
    grid = "[[grid]]\n" + GRID.replace('"omp"', '"omp", "snip"')
    cells = load(tmp_path, "[base.calibration]\nalignment = 4\nn_batches = 2\n" + grid).cells
    assert [(cell.row[1], cell.row[2]) for cell in cells] == [
        ("dense", ""),
        ("omp", ""),
        ("snip", "n_batches=2 alignment=4"),
    ]
    assert [cell.label for cell in cells] == ["dense", "omp", "snip"]
    several = load(tmp_path, "[[grid]]\n" + GRID + "calibration.alignment = [1, 4]\n").cells
    assert len(several) == 2


def test_options_at_their_defaults_make_no_variant(tmp_path):
    grid = GRID.replace("omp", "chita")
    cells = load(tmp_path, "[[grid]]\n" + grid + "[[grid]]\n" + grid + "pruning.options.lam = 0.01\n").cells
    assert len(cells) == 2


def test_a_dense_run_is_the_same_one_under_every_calibration_and_pruning(tmp_path):
    plain = planned(load(tmp_path, "[[grid]]\n" + GRID)).runs[0].key
    grid = GRID.replace("0.9", "0.5").replace("omp", "snip")
    other = load(tmp_path, "[[grid]]\n" + grid + "calibration.alignment = 4\npruning.pattern = '2:4'\n")
    assert planned(other).runs[0].key == plain
    assert [cell.row[2] for cell in other.cells] == ["", "alignment=4 pattern=2:4"]


def test_calibration_data_counts_by_the_name_of_its_directory(tmp_path):
    (tmp_path / "my photos").mkdir()
    grid = GRID.replace("omp", "snip")
    text = f"calibration.data = '{tmp_path / 'my photos'}/'\n"
    cells = load(tmp_path, "[[grid]]\n" + grid + "[[grid]]\n" + grid + text).cells
    assert [str(cell) for cell in cells[1:]] == [
        "tiny-blip snip@90% data=scenes vqa seed 0",
        "tiny-blip snip@90% data=my photos vqa seed 0",
    ]


def test_settings_that_a_method_does_not_have_are_refused_with_the_entry(tmp_path):
    with pytest.raises(ConfigError, match=r"\[\[grid\]\] 3: method 'chita\+\+' takes no pattern"):
        load(
            tmp_path,
            VARIANTS.replace(
                '"omp"]\nsparsities = [0.5]\ntasks = ["vqa"]\npruning.pattern',
                '"chita++"]\nsparsities = [0.5]\ntasks = ["vqa"]\npruning.pattern',
            ),
        )
    with pytest.raises(ConfigError, match=r"the sparsity of pattern 1:4 must be 0\.75, got 0\.5"):
        load(tmp_path, VARIANTS.replace("2:4", "1:4"))


def test_settings_of_the_command_line():
    assert parse_set(["finetuning.lr=1e-4, 5e-4", "seed=0,1", "task.test=val", "model=a/b,c"]) == {
        "finetuning.lr": [1e-4, 5e-4],
        "seed": [0, 1],
        "task.test": ["val"],
        "model.name": ["a/b", "c"],
    }
    assert parse_set(["finetuning.betas=[0.9,0.95]"]) == {"finetuning.betas": [[0.9, 0.95]]}
    assert parse_set(["pruning.method=omp,chita++"]) == {"pruning.method": ["omp", "chita++"]}

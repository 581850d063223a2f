"""What a stage reads is its key, and nothing else: which stages run again when something moves."""

import importlib
import re
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
from conftest import small_model

from eval import get_task
from vlprune.config import (
    CalibrationConfig,
    FinetuningConfig,
    ModelConfig,
    Options,
    PruningConfig,
    RunConfig,
    TaskConfig,
)
from vlprune.data.fingerprint import data_fingerprint
from vlprune.models import save_model
from vlprune.models.fingerprint import Fingerprint
from vlprune.pipeline import chain
from vlprune.pruners import PRUNERS
from vlprune.stages import examples
from vlprune.stages import fingerprints as module
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.masks import settings_read
from vlprune.store import code
from vlprune.store.code import code_digest

KINDS = ("statistics", "masks", "tuned", "predictions", "record")


@pytest.fixture
def config(dataset, tmp_path):
    save_model(small_model("xvlm"), tmp_path / "model")
    return RunConfig(
        model=ModelConfig(str(tmp_path / "model")),
        calibration=CalibrationConfig(str(dataset), batch_size=4),
        pruning=PruningConfig("multiflow", 0.75),
        task=TaskConfig("captioning", str(dataset)),
    )


def keys(config):
    """{kind of stage: keys}."""
    found = chain(config, Fingerprints())
    stages = {"statistics": found.statistics, "masks": (found.masks,), "tuned": (found.tuned,)}
    stages |= {"predictions": (found.predictions,), "record": (found.record,)}
    return {kind: tuple(stage.key for stage in own if stage) for kind, own in stages.items()}


def moved(before, after):
    """The kinds of stages whose keys differ."""
    return tuple(kind for kind in KINDS if before[kind] != after[kind])


def pruned(config, method, sparsity=0.75, **options):
    return replace(config, pruning=PruningConfig(method, sparsity, None, Options(options)))


@pytest.mark.parametrize(
    ("method", "part", "changes", "expected"),
    [
        ("multiflow", "calibration", {"n_batches": 9}, KINDS),
        ("multiflow", "calibration", {"alignment": 2.0}, ()),
        ("snip", "calibration", {"alignment": 2.0}, KINDS),
        ("omp", "calibration", {"n_batches": 9, "batch_size": 2, "alignment": 2.0, "data": "scenes"}, ()),
        ("chita", "calibration", {"n_batches": 9}, KINDS[1:]),
        ("itersnip", "calibration", {"n_batches": 9}, ()),
        ("itersnip", "calibration", {"batch_size": 2}, KINDS[1:]),
        ("sparsegpt", "calibration", {"n_batches": 9}, KINDS[1:]),
        ("sparsegpt", "calibration", {"alignment": 2.0}, ()),
        ("omp", "finetuning", {"lr": 1e-3}, KINDS[2:]),
        ("omp", "finetuning", {"steps": 0}, KINDS[2:]),
        ("omp", "task", {"options": Options(num_beams=2)}, KINDS[3:]),
        ("omp", "task", {"test": "val"}, KINDS[3:]),
        ("omp", "task", {"train": "val"}, KINDS[2:]),
        ("omp", "task", {"image_size": 48}, KINDS[2:]),
        ("omp", "task", {"precision": "bf16"}, KINDS[3:]),
        ("omp", "task", {"extra": "meteor"}, KINDS[4:]),
        ("omp", "pruning", {"sparsity": 0.5}, KINDS[1:]),
        ("omp", "pruning", {"pattern": "1:4"}, KINDS[1:]),
    ],
)
def test_a_setting_moves_the_stages_that_read_it(config, method, part, changes, expected):
    before = pruned(config, method)
    after = replace(before, **{part: replace(getattr(before, part), **changes)})
    found = moved(keys(before), keys(after))
    # A method of no stored statistics has no keys of them that could move.
    assert found == tuple(kind for kind in expected if keys(before)[kind])


def test_options_at_their_defaults_and_options_of_others_move_no_key(config):
    assert keys(pruned(config, "chita")) == keys(pruned(config, "chita", lam=1e-2))
    assert moved(keys(pruned(config, "chita")), keys(pruned(config, "chita", lam=1.0))) == KINDS[1:]
    retrieval = replace(config, task=replace(config.task, name="retrieval", options=Options(k_test=16)))
    assert keys(retrieval) == keys(replace(retrieval, task=replace(retrieval.task, options=Options())))
    with pytest.raises(ValueError, match="unknown key 'num_beams'"):
        keys(replace(retrieval, task=replace(retrieval.task, options=Options(num_beams=2))))


def test_a_setting_that_a_search_does_not_read_moves_no_key_beside_defaults(config):
    plain = replace(pruned(config, "itersnip"), calibration=CalibrationConfig(config.calibration.data))
    assert keys(plain) == keys(replace(plain, calibration=replace(plain.calibration, n_batches=9)))


def test_a_seed_moves_all_and_dense_runs_read_neither_calibration_nor_method(config):
    assert moved(keys(config), keys(replace(config, seed=1))) == KINDS
    dense = replace(config, pruning=PruningConfig())
    assert keys(dense) == keys(replace(dense, calibration=CalibrationConfig()))
    assert keys(dense)["masks"] == ()


def test_nothing_moves_when_files_do(config, dataset, tmp_path):
    before = keys(config)
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    shutil.copytree(dataset, tmp_path / "photos")
    there = str(tmp_path / "photos")
    after = replace(
        config,
        model=ModelConfig(str(tmp_path / "elsewhere")),
        calibration=replace(config.calibration, data=there),
        task=replace(config.task, data=there),
    )
    assert keys(after) == before


def test_other_contents_under_the_same_names_move_what_reads_them(config, dataset, tmp_path):
    before = keys(config)
    tokenizer = tmp_path / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"truncation":', '"truncation" :', 1) + "\n")
    assert moved(before, keys(config)) == KINDS
    own, split = keys(config), replace(config, calibration=replace(config.calibration, data="scenes"))
    assert own != before
    apart = keys(split)
    karpathy = dataset / "dataset_small.json"
    karpathy.write_text(karpathy.read_text().replace("a dog number 1", "a dog number one"))
    assert moved(apart, keys(split)) == KINDS[2:]


def test_images_that_are_left_out_move_what_saw_the_others(config, dataset):
    def skipping():
        found = chain(config, Fingerprints(skip_broken=True))
        return {"tuned": found.tuned.key, "predictions": found.predictions.key, "record": found.record.key}

    whole = chain(config, Fingerprints())
    assert skipping() == {"tuned": whole.tuned.key, "predictions": whole.predictions.key, "record": whole.record.key}
    before = data_fingerprint(str(dataset))
    # A change in the middle of a picture, which the fingerprint of the directory does not see.
    path = dataset / "images" / "0017.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    if data_fingerprint(str(dataset)) == before:
        assert skipping()["tuned"] == whole.tuned.key
    assert skipping()["predictions"] != whole.predictions.key


def test_images_that_calibration_has_others_for_move_what_it_measured(config, dataset):
    images = dataset / "images"
    (images / "0005.png").write_text("no picture")
    whole, skipping = Fingerprints(), Fingerprints(skip_broken=True)
    [stage] = chain(config, skipping).statistics
    assert "images/0005.png" in stage.reads["left_out"][0]
    assert stage.key != chain(config, whole).statistics[0].key
    assert whole.left_out_of_calibration(config, 8) == []
    few = replace(config, calibration=replace(config.calibration, n_batches=1, batch_size=2))
    assert skipping.left_out_of_calibration(few, 1) == []  # it is not among the first


def test_the_seed_moves_the_masks_of_methods_that_draw_or_measure(config):
    for method, drawn in (("omp", False), ("random", True), ("multiflow", True), ("itersnip", True)):
        before, after = (keys(replace(pruned(config, method), seed=seed)) for seed in (0, 1))
        assert ("masks" in moved(before, after)) == drawn


@pytest.mark.parametrize(
    ("where", "name", "expected"),
    [
        ("vlprune.models", "VERSION", KINDS),
        ("vlprune.stages.statistics", "STATISTICS_VERSION", KINDS),
        ("vlprune.stages.fingerprints", "READERS_VERSION", KINDS),
        ("vlprune.stages.fingerprints", "SELECTION_VERSION", KINDS[1:]),
        ("vlprune.stages.tuned", "FINETUNE_VERSION", KINDS[2:]),
        ("vlprune.stages.tuned", "MASKS_VERSION", KINDS[2:]),
        ("vlprune.stages.tuned", "SEEDS_VERSION", KINDS[2:]),
        ("vlprune.stages.tuned", "AUGMENT_VERSION", KINDS[2:]),
    ],
)
def test_a_raised_version_of_shared_code_moves_what_it_makes(config, monkeypatch, where, name, expected):
    own = replace(config, finetuning=FinetuningConfig(augment="paper"))
    before = keys(own)
    monkeypatch.setattr(f"{where}.{name}", 1000)
    assert moved(before, keys(own)) == expected


def test_the_settings_that_a_method_reads():
    assert settings_read("omp") == {"pruning.pattern"}
    read = {"calibration.data", "calibration.batch_size", "pruning.pattern"}
    assert settings_read("multiflow") == {*read, "calibration.n_batches"}
    assert settings_read("snip") == {*read, "calibration.n_batches", "calibration.alignment"}
    steps = {"pruning.options.steps", "pruning.options.step_batches"}
    assert settings_read("itersnip") == {*read, *steps, "calibration.alignment"}


def test_floors_and_answer_list_are_made_once_in_a_process_for_the_same_data(dataset, monkeypatch):
    task, made = TaskConfig("vqa", str(dataset)), []
    own = replace(
        get_task("vqa"),
        floors=lambda train, test, options: made.append(("floors", len(train), len(test))) or {},
        prepare=lambda train: made.append(("answers", len(train))) or ["yes"],
    )
    monkeypatch.setattr(examples, "get_task", lambda _: own)
    for _ in range(2):
        assert examples.floors(task) == {}
        assert examples.prepared(task) == ["yes"]
    assert made == [("floors", 12, 6), ("answers", 12)]
    questions = dataset / "train_questions.json"
    questions.write_text(questions.read_text().replace("is it a dog", "is it a large dog"))
    examples.floors(task)
    assert made[2:] == [("floors", 12, 6)]


def test_each_file_is_looked_at_once(config, monkeypatch):
    read = []
    found = Fingerprint("digest", "listing", ())
    monkeypatch.setattr(module, "take_model_fingerprint", lambda name: read.append(name) or found)
    known = Fingerprints()
    for seed in range(3):
        chain(replace(config, seed=seed), known)
    assert read == [config.model.name]


# ---- code ----

SOURCE = '''
"""A method."""
from vlprune.pruners.pruner import Pruner

POWER = {power}


def helper(weight):
    """{doc}"""
    return weight.abs() ** POWER


def score(weight{annotation}, stats):
    # {comment}
    return helper(weight)


def other():
    return {other}
'''


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """source of a module, source of another beside it -> the digest of its `score`, with its class `Options`."""
    monkeypatch.syspath_prepend(tmp_path)

    def digest(source, beside=""):
        for name, text in (("own_method", source), ("own_helpers", beside)):
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        for cached in (code.code_digest, code._module, code._definition):
            cached.cache_clear()
        module = importlib.import_module("own_method")
        return code_digest(module.score, options=getattr(module, "Options", None))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # its time stamps are too coarse for edits one after another
    yield digest
    for name in ("own_method", "own_helpers"):
        sys.modules.pop(name, None)


def test_an_edited_formula_has_another_digest_and_a_comment_has_not(digest_of):
    values = {"power": 2, "doc": "d", "comment": "c", "annotation": "", "other": 1}
    same = digest_of(SOURCE.format(**values))
    assert digest_of(SOURCE.format(**{**values, "doc": "e", "comment": "x", "annotation": ": int", "other": 2})) == same
    assert digest_of(SOURCE.format(**{**values, "power": 3})) != same


@pytest.mark.parametrize(
    "source",
    [
        "def helper(w, power): return w**power\nscore = functools.partial(helper, power={})",
        "def made(power):\n    def inner(w): return w**power\n    return inner\nscore = made({})",
        "def helper(w): return w**{}\nscore = lambda w: helper(w)",
        "score = lambda w: w**{}",
        "if True:\n    def helper(w): return w**{}\nelse:\n    helper = None\ndef score(w): return helper(w)",
        "TABLE = {{}}\nTABLE.update(power={})\ndef score(w): return w ** TABLE['power']",
        "TABLE = {{}}\nTABLE['power'] = {}\ndef score(w): return w ** TABLE['power']",
        "for POWER in [{}]: pass\ndef score(w): return w**POWER",
        "def helper(w, power={}): return w**power\n@functools.cache\ndef score(w): return helper(w)",
        "class Powers:\n    power = {}\nclass Own(Powers): pass\ndef score(w): return w**Own.power",
    ],
)
def test_whatever_a_function_reaches_counts(digest_of, source):
    assert digest_of("import functools\n" + source.format(2)) != digest_of("import functools\n" + source.format(3))


@pytest.mark.parametrize(
    "source",
    [
        "from own_helpers import helper\ndef score(w): return helper(w)",
        "from own_helpers import *\ndef score(w): return helper(w)",
        "import own_helpers\ndef score(w): return own_helpers.helper(w)",
        "def score(w):\n    from own_helpers import helper\n    return helper(w)",
    ],
)
def test_a_file_beside_the_own_one_counts(digest_of, source):
    helper = "def helper(w): return w**{}\ndef other(): return {}"
    same = digest_of(source, helper.format(2, 1))
    assert digest_of(source, helper.format(2, 2)) == same
    assert digest_of(source, helper.format(3, 1)) != same


def test_messages_and_fields_of_options_do_not_count(digest_of):
    source = (
        "from dataclasses import dataclass\n@dataclass\nclass Options:\n{}    @property\n    def twice(self): "
        "return {} * self.a\ndef message(): return {!r}\ndef score(w, options=Options()):\n"
        "    if w is None: raise ValueError(message())\n    return w**options.twice"
    )
    same = digest_of(source.format("    a: int = 1\n", 2, "no weight"))
    assert digest_of(source.format("    a: int = 1\n    b: int = 0\n", 2, "a weight, please")) == same
    assert digest_of(source.format("    a: int = 1\n", 3, "no weight")) != same


def test_what_has_no_source_to_be_found_is_refused():
    class Callable:
        def __call__(self, w): ...

    with pytest.raises(TypeError, match="is no function, class or partial application"):
        code_digest(Callable())
    with pytest.raises(TypeError, match=r"bound to 0 = .* neither a plain value nor a function"):
        code_digest(partial(helper, object()))


def helper(w): ...


def test_functions_without_source_count_by_what_they_do():
    def made(text):
        space = {}
        exec(text, space)
        space["f"].__module__ = "nowhere"
        return code_digest(space["f"])

    assert made("def f(x): return x + 1") == made("def f(x):\n  # a comment\n  return x + 1")
    assert len({made(f"def f(x): return {text}") for text in ("x + 1", "x + 2", "abs(x)", "max(x)")}) == 4


def test_every_method_has_a_digest_of_its_own_where_its_code_is():
    digests = {name: (code_digest(*pruner.code), pruner.within) for name, pruner in PRUNERS.items()}
    assert len(set(digests.values())) == len(digests)
    assert all(re.fullmatch(r"[0-9a-f]{16}", digest) for digest, _ in digests.values())

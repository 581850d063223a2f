from dataclasses import asdict, replace

import pytest

from vlprune.config import (
    CalibrationConfig,
    ConfigError,
    FinetuningConfig,
    PruningConfig,
    RunConfig,
    TaskConfig,
    limited,
    unknown,
)
from vlprune.schema import build
from vlprune.store.keys import Contents, digest, masks_key, run_key, statistics_key

M = Contents("m", 1, "c", 1, 1, "t", 1)
N = replace(M, model="n")
OMP = RunConfig(pruning=PruningConfig("omp", 0.75))


def test_unknown_names_the_nearest_and_all():
    assert unknown("method", "multflow", ["omp", "multiflow"]) == (
        "unknown method 'multflow'; did you mean 'multiflow'? There are: omp, multiflow"
    )
    assert unknown("method", "zzz", ["omp"]) == "unknown method 'zzz'. There are: omp"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningConfig("omp", 1.0), r"sparsity must be in \[0, 1\)"),
        (lambda: PruningConfig("omp", 63), r"did you mean 0.63\?"),
        (lambda: PruningConfig("omp", float("nan")), "sparsity must be"),
        (lambda: PruningConfig("dense", 0.5), "dense model must be 0"),
        (lambda: CalibrationConfig(n_batches=0), "calibration.n_batches must be at least 1, got 0"),
        (lambda: FinetuningConfig(schedule="step"), "one of linear, cosine, got 'step'"),
        (lambda: FinetuningConfig(lr=0), "finetuning.lr must be finite and above 0, got 0"),
        (lambda: FinetuningConfig(lr=float("inf")), "finetuning.lr must be finite and above 0, got inf"),
        (lambda: FinetuningConfig(lr=float("nan")), "finetuning.lr must be finite and above 0, got nan"),
        (lambda: FinetuningConfig(weight_decay=float("inf")), "finetuning.weight_decay must be finite"),
        (lambda: FinetuningConfig(clip=float("inf")), "finetuning.clip must be finite"),
        (lambda: FinetuningConfig(betas=(0.9, float("nan"))), "finetuning.betas must be in"),
        (lambda: FinetuningConfig(warmup=float("inf")), "finetuning.warmup must be in"),
        (lambda: FinetuningConfig(steps=3, epochs=2), "takes steps or epochs, got steps = 3 and epochs = 2"),
        (lambda: FinetuningConfig(epochs=0), "finetuning.epochs must be at least 1, got 0"),
        (lambda: FinetuningConfig(device_batch=0), "finetuning.device_batch must be at least 1, got 0"),
        (lambda: FinetuningConfig(eps=0), "finetuning.eps must be finite and above 0, got 0"),
        (lambda: FinetuningConfig(augment="papr"), "finetuning.augment must be one of none, paper, got 'papr'"),
        (lambda: FinetuningConfig(decayed="some"), "finetuning.decayed must be one of weights, all"),
        (lambda: FinetuningConfig(precision="fp16"), "finetuning.precision must be one of fp32, bf16"),
        (lambda: FinetuningConfig(select="best"), "give finetuning.epochs, not steps"),
        (lambda: TaskConfig(image_size=0), "task.image_size must be at least 1, got 0"),
        (lambda: TaskConfig(max_length=3), "task.max_length must be at least min_length = 5, got 3"),
    ],
)
def test_a_value_out_of_range_is_an_error(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_fine_tuning_has_steps_unless_it_has_epochs():
    assert FinetuningConfig() == FinetuningConfig(steps=40)
    assert FinetuningConfig(epochs=3).steps is None
    for config in (FinetuningConfig(epochs=3, select="best"), FinetuningConfig(steps=0)):
        assert build(FinetuningConfig, asdict(config), "x") == config


@pytest.mark.parametrize(
    ("limit", "batch_size", "n_batches", "steps", "step_batches"),
    [(1, 2, 1, 1, 1), (4, 2, 2, 2, 1), (64, 32, 2, 2, 1), (1000, 32, 31, 31, 1), (10**6, 32, 3000, 60, 50)],
)
def test_a_limited_run_calibrates_on_about_as_many_pairs(limit, batch_size, n_batches, steps, step_batches):
    whole = RunConfig(calibration=CalibrationConfig(n_batches=3000, batch_size=32, steps=60, step_batches=50))
    own = limited(whole, limit)
    assert own.task.limit == limit
    assert own.calibration == replace(
        whole.calibration, batch_size=batch_size, n_batches=n_batches, steps=steps, step_batches=step_batches
    )
    assert limited(replace(whole, task=TaskConfig(limit=3)), limit).task.limit == min(3, limit)


def test_build_reads_nested_values_and_coerces_them():
    config = build(RunConfig, {"seed": 3, "finetuning": {"lr": 1, "betas": [0, 0.5]}, "task": {"limit": 7}}, "x")
    assert (config.seed, config.finetuning.lr, config.finetuning.betas) == (3, 1.0, (0.0, 0.5))
    assert isinstance(config.finetuning.lr, float)
    assert config.task.limit == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "x: unknown key 'sed'; did you mean 'seed'"),
        ({"finetuning": {"step": 1}}, "x.finetuning: unknown key 'step'; did you mean 'steps'"),
        ({"finetuning": {"steps": 1.5}}, "x.finetuning.steps must be int, got 1.5"),
        ({"finetuning": {"steps": True}}, "must be int, got True"),
        ({"finetuning": {"betas": [0.9]}}, "must be a list of 2 values"),
        ({"finetuning": 3}, "x.finetuning must be a table"),
        ({"task": {"limit": "all"}}, "x.task.limit must be int, got 'all'"),
    ],
)
def test_build_names_what_is_wrong(values, message):
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, values, "x")


def test_digest_is_stable_and_ignores_order():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1}) == "855ad49701472507"
    assert digest(RunConfig()) != digest(RunConfig(seed=1))
    with pytest.raises(TypeError, match="got object"):
        digest(object())


def test_keys_change_with_what_their_stage_reads_and_nothing_else():
    longer = replace(OMP, finetuning=FinetuningConfig(steps=99))
    sparser = replace(OMP, pruning=PruningConfig("omp", 0.9))
    measured = replace(OMP, calibration=CalibrationConfig(n_batches=9))
    assert statistics_key(OMP, M, "k") == statistics_key(longer, M, "k") == statistics_key(sparser, M, "k")
    others = [statistics_key(measured, M, "k"), statistics_key(OMP, N, "k"), statistics_key(OMP, M, "l")]
    assert len({statistics_key(OMP, M, "k"), *others}) == 4
    assert masks_key(OMP, M) == masks_key(longer, M)
    assert len({masks_key(config, M) for config in (OMP, sparser, measured, replace(OMP, seed=1))}) == 4
    runs = [run_key(config, M) for config in (OMP, longer, sparser, measured)]
    assert len({*runs, run_key(OMP, replace(M, task_code=2)), run_key(OMP, N)}) == 6


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("model_code", {statistics_key, masks_key, run_key}),
        ("statistics_code", {statistics_key, masks_key, run_key}),
        ("method_code", {masks_key, run_key}),
        ("task_code", {run_key}),
    ],
)
def test_other_code_makes_other_keys_of_what_it_makes(part, changed):
    other = replace(M, **{part: 2})
    keys = {statistics_key: ("kind",), masks_key: (), run_key: ()}
    assert {key for key, more in keys.items() if key(OMP, M, *more) != key(OMP, other, *more)} == changed


def test_data_counts_by_its_content_and_not_by_its_name():
    moved = replace(OMP, task=TaskConfig(data="elsewhere"), calibration=CalibrationConfig("elsewhere"))
    assert run_key(OMP, M) == run_key(moved, M)
    assert masks_key(OMP, M) == masks_key(moved, M)


def test_the_dense_run_does_not_depend_on_calibration():
    measured = RunConfig(calibration=CalibrationConfig(n_batches=9))
    assert run_key(RunConfig(), M) == run_key(measured, M)


def test_other_photos_under_the_same_name_make_other_keys():
    other = replace(M, task="other photos")
    assert run_key(OMP, M) != run_key(OMP, other)
    assert masks_key(OMP, M) == masks_key(OMP, other)
    assert masks_key(OMP, M) != masks_key(OMP, replace(M, calibration="other photos"))

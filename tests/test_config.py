import pickle
from dataclasses import replace
from typing import Annotated

import pytest
from pydantic import Field

from eval.options import NoOptions
from vlprune.config import (
    CalibrationConfig,
    ConfigError,
    FinetuningConfig,
    Options,
    PruningConfig,
    RunConfig,
    TaskConfig,
    build,
    changed,
    to_plain,
    unknown,
    validated,
)
from vlprune.execution import Execution, gibibytes
from vlprune.store.keys import digest


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
        (lambda: PruningConfig("dense", 0.5), "dense model has no sparsity"),
        (lambda: PruningConfig("omp", 0.5, "²:4"), "a pattern must be N:M .* got '²:4'"),
        (lambda: PruningConfig("omp", 0.5, "٢:٤"), "a pattern must be N:M .* got '٢:٤'"),
        (lambda: PruningConfig("omp", 0.5, "1" * 5000 + ":4"), r"a pattern must be N:M .* got '1+\.\.\.1+:4'$"),
        (lambda: CalibrationConfig(n_batches=10**20), "n_batches must be below 2147483648"),
        (lambda: FinetuningConfig(steps=10**20), "steps must be below 2147483648"),
        (lambda: TaskConfig(limit=10**20), "limit must be below 2147483648"),
        (lambda: TaskConfig(image_size=10**20), "image_size must be at most 8192"),
        (lambda: Execution(workers=10**9), "workers, which are processes, must be at most 1024, got 1000000000"),
        (lambda: Execution(memory_limit=float("nan")), "memory_limit must be finite and at least 0, got nan"),
        (lambda: gibibytes(float("inf"), "--memory-limit"), "--memory-limit must be a number of GiB"),
        (lambda: CalibrationConfig(n_batches=0), "n_batches must be at least 1, got 0"),
        (lambda: FinetuningConfig(schedule="step"), "'linear' or 'cosine', got 'step'"),
        (lambda: FinetuningConfig(lr=0), "lr must be above 0, got 0"),
        (lambda: FinetuningConfig(lr=float("inf")), "lr must be a finite number, got inf"),
        (lambda: FinetuningConfig(lr=float("nan")), "lr must be a finite number, got nan"),
        (lambda: FinetuningConfig(weight_decay=float("inf")), "weight_decay must be a finite"),
        (lambda: FinetuningConfig(clip=float("inf")), "clip must be a finite"),
        (lambda: FinetuningConfig(betas=(0.9, float("nan"))), "betas must be"),
        (lambda: FinetuningConfig(betas=(0.9, 1.0)), "betas must be below 1, got 1"),
        (lambda: FinetuningConfig(warmup=float("inf")), "warmup must be at most 1"),
        (lambda: FinetuningConfig(steps=3, epochs=2), "takes steps or epochs, got steps = 3 and epochs = 2"),
        (lambda: FinetuningConfig(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: FinetuningConfig(device_batch=0), "device_batch must be at least 1, got 0"),
        (lambda: FinetuningConfig(eps=0), "eps must be above 0, got 0"),
        (lambda: FinetuningConfig(augment="papr"), "augment must be 'none' or 'paper', got 'papr'"),
        (lambda: FinetuningConfig(decayed="some"), "decayed must be 'weights' or 'all'"),
        (lambda: FinetuningConfig(precision="fp16"), "precision must be 'fp32' or 'bf16'"),
        (lambda: FinetuningConfig(select="best"), "give finetuning.epochs, not steps"),
        (lambda: TaskConfig(precision="fp16"), "precision must be 'fp32', 'tf32' or 'bf16'"),
        (lambda: TaskConfig(image_size=0), "image_size must be at least 1, got 0"),
        (lambda: RunConfig(seed=2**32), "seed must be below 4294967296"),
    ],
)
def test_a_value_out_of_range_is_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_fine_tuning_has_steps_unless_it_has_epochs():
    assert FinetuningConfig() == FinetuningConfig(steps=40)
    assert FinetuningConfig(epochs=3).steps is None
    for config in (FinetuningConfig(epochs=3, select="best"), FinetuningConfig(steps=0)):
        assert build(FinetuningConfig, to_plain(config), "x") == config


def test_build_reads_nested_values():
    values = {
        "seed": 3,
        "finetuning": {"lr": 1, "betas": [0, 0.5]},
        "pruning": {"method": "chita", "options": {"lam": 2}},
    }
    config = build(RunConfig, values, "x")
    assert (config.seed, config.finetuning.lr, config.finetuning.betas) == (3, 1.0, (0.0, 0.5))
    assert isinstance(config.finetuning.lr, float)
    assert dict(config.pruning.options) == {"lam": 2}
    assert build(RunConfig, to_plain(config), "x") == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(replace(config, pruning=replace(config.pruning, options=Options(lam=2))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "x: unknown key 'sed'; did you mean 'seed'"),
        ({"finetuning": {"step": 1}}, "x: finetuning: unknown key 'step'; did you mean 'steps'"),
        ({"finetuning": {"steps": 1.5}}, "x: finetuning.steps must be a valid integer, got 1.5"),
        ({"finetuning": {"steps": True}}, "x: finetuning.steps must be a valid integer, got True"),
        ({"finetuning": {"betas": [0.9]}}, "x: finetuning.betas must be a list of another length"),
        ({"finetuning": 3}, "x: finetuning must be"),
        ({"task": {"limit": "all"}}, "x: task.limit must be a valid integer, got 'all'"),
        ({"pruning": {"options": 3}}, "x: pruning.options must be a table, got 3"),
    ],
)
def test_build_names_what_is_wrong(values, message):
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, values, "x")


@validated
class Window:
    """A validated class of somebody else."""

    low: Annotated[int, Field(ge=0)] = 1
    high: int = 2

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ConfigError(f"high must be at least low = {self.low}, got {self.high}")


def test_options_are_built_by_their_owner():
    assert build(Window, Options(low=2, high=5), "options") == Window(2, 5)
    assert changed(Window(1, 5)) == {"high": 5}
    assert build(NoOptions, Options(), "options") == NoOptions()
    for values, message in (
        ({"lo": 1}, r"options: unknown key 'lo'; did you mean 'low'\? There are: low, high"),
        ({"low": 3}, r"options: high must be at least low = 3, got 2"),
        ({"low": -1}, r"options: low must be at least 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(Window, Options(values), "options")


def test_digest_is_stable_and_ignores_order():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1}) == "855ad49701472507"
    assert digest(RunConfig()) != digest(RunConfig(seed=1))
    with pytest.raises(TypeError, match="is no plain value"):
        digest(object())

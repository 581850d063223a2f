"""The look at models and data before a sweep, so that what cannot be read is said once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vlprune.config import DENSE, ConfigError, RunConfig
from vlprune.data import load_pairs
from vlprune.models import load_model
from vlprune.pipeline import examples


def preflight(configs: Iterable[RunConfig]) -> None:
    """Loads every model and every data set of the configs once.

    Raises:
        ConfigError: the first that cannot be loaded, in one line.
    """
    configs = list(configs)
    for model in dict.fromkeys(config.model for config in configs):
        _load(f"model {model!r}", lambda model=model: load_model(model))
    for data in dict.fromkeys(c.calibration.data for c in configs if c.pruning.method != DENSE):
        _load(f"calibration data {data!r}", lambda data=data: load_pairs(data, "train"))
    for task in dict.fromkeys(config.task for config in configs):
        for split in ("train", "test"):
            what = f"the {split} examples of {task.name} in {task.data!r}"
            _load(what, lambda task=task, split=split: examples(task, split))


def _load(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except Exception as error:
        # Whatever a broken file raises would fail every run alike.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"cannot load {what}: {reason}") from error

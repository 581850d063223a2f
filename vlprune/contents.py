"""What the names in a config stand for at present: digests of files, versions of code."""

from __future__ import annotations

from collections.abc import Callable

from eval import get_task
from vlprune import models
from vlprune.calibrate.collect import STATISTICS_VERSION
from vlprune.config import DENSE, RunConfig
from vlprune.data import data_digest
from vlprune.pruners import get_pruner
from vlprune.store.keys import Contents


def contents(
    config: RunConfig,
    of_model: Callable[[str], str] = models.model_digest,
    of_data: Callable[[str], str] = data_digest,
) -> Contents:
    """The contents of a config.

    Args:
        config: of the run.
        of_model: name -> digest; a cached one where many configs share their models.
        of_data: name -> digest, likewise.

    Raises:
        ValueError: an unknown name.
        OSError: files that cannot be read.
    """
    dense = config.pruning.method == DENSE
    return Contents(
        model=of_model(config.model),
        model_code=models.VERSION,
        calibration="" if dense else of_data(config.calibration.data),
        statistics_code=0 if dense else STATISTICS_VERSION,
        method_code=0 if dense else get_pruner(config.pruning.method).version,
        task=of_data(config.task.data),
        task_code=get_task(config.task.name).version,
    )

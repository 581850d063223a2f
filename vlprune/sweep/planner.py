"""What a sweep must know of models, data and code before it runs: the keys of its runs, and whether they can run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vlprune.config import ConfigError, RunConfig
from vlprune.data.source import DATASETS
from vlprune.models import MODELS
from vlprune.pipeline import chain
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.stage import Stage
from vlprune.store.identity import Identity, identities, settled
from vlprune.sweep.cells import Table
from vlprune.sweep.given import settings_given
from vlprune.sweep.options import Options, quickstart
from vlprune.sweep.plan import SHARED, Artifact, Plan, Run
from vlprune.sweep.preflight import preflight
from vlprune.sweep.table import load_table


class Planner:
    """Plans in this process, which imports torch for it."""

    def plan(self, options: Options) -> tuple[Plan, dict[str, Identity]]:
        """The plan of a sweep, and what its files look like; nothing where the plan may change without a file.

        Raises:
            ConfigError: the table or an option is wrong, or files cannot be read.
        """
        known = Fingerprints(skip_broken=options.skip_broken)
        # Absolute, so that equal names in two places are not the same data.
        data = None if options.data is None else str(options.data.resolve())
        given, suffix = settings_given(options)
        table = load_table(options.table or quickstart(), given, data, options.limit)
        made = plan(table.named(f"{table.name}{suffix}"), known)
        return made, {} if options.skip_broken else _files(made.table, known)

    def check(self, configs: Iterable[RunConfig], *, skip_broken: bool) -> list[str]:
        """The images that are left out of runs, all that they need being there; see `preflight`."""
        return preflight(configs, skip_broken=skip_broken)

    def devices(self) -> list[str]:
        """The visible CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
        import torch

        number, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        return (visible.split(",") if visible else [str(i) for i in range(number)])[:number]


def plan(table: Table, known: Fingerprints) -> Plan:
    """The plan of a table.

    Raises:
        ConfigError: a name in a cell that is not known, files that cannot be read.
    """
    artifacts: dict[str, Artifact] = {}  # runs share most of theirs
    runs: dict[str, Run] = {}
    for cell in table.cells:
        try:
            own = chain(cell.config, known)
        except OSError as error:
            raise ConfigError(f"{cell.where}: the models and data of a run cannot be read: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{cell.where}: {error}") from error
        stages = [stage for kind in (*SHARED, "record") for stage in own.of_kind(kind)]
        for stage in stages:
            if stage.key not in artifacts:
                artifacts[stage.key] = _artifact(stage)
        run = Run(cell, tuple(artifacts[stage.key] for stage in stages))
        if (other := runs.setdefault(run.key, run)) is not run:
            raise ConfigError(f"{cell.where}: {run} is the same run as {other}, which has another place in the table")
    return Plan(table, tuple(runs.values()))


def _artifact(stage: Stage) -> Artifact:
    together = stage.together if stage.kind in SHARED else stage.key
    return Artifact(stage.kind, stage.key, together, stage.path(Path()), stage.runs_model)


def _files(table: Table, known: Fingerprints) -> dict[str, Identity]:
    """What the files behind the keys of a table look like; nothing where they do not tell all, or are changing."""
    models = {cell.config.model.name for cell in table.cells}
    data = {data for cell in table.cells for data in (cell.config.task.data, cell.config.calibration.data)}
    if not all(name in (*MODELS, *DATASETS) or Path(name).exists() for name in models | data):
        return {}  # names of a hub, whose revisions come and go
    try:
        found = identities(sorted(known.paths))
        again = Fingerprints()
        for name in models:
            again.model_files(name)
        for name in data:
            again.data(name)
    except OSError:
        return {}
    same = all(again.listings.get(name) == listing for name, listing in known.listings.items())
    return found if same and settled(found) else {}

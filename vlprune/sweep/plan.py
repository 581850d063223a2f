"""A plan: the graph of all stages of a table, each once, as jobs for workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlprune.config import DENSE, ConfigError
from vlprune.pipeline import Chain, chain
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.stage import Stage
from vlprune.store.artifacts import read_note
from vlprune.store.manifest import Manifest, Place
from vlprune.store.record import LOG, Record, read_record, run_directory
from vlprune.sweep.job import Job
from vlprune.sweep.table import Cell, Table

SHARED = ("statistics", "masks", "tuned")  # kinds of stages that several runs can have in common, in their order


@dataclass(frozen=True)
class Plan:
    """A table with the keys of its runs.

    Attributes:
        table: the table.
        keys: the record key of each cell, in the order of the cells.
        chains: the stages of each cell.
    """

    table: Table
    keys: tuple[str, ...]
    chains: tuple[Chain, ...]

    def places(self) -> Iterator[tuple[str, Cell, Chain]]:
        """(record key, cell, its stages) of each place."""
        return zip(self.keys, self.table.cells, self.chains, strict=True)

    def records(self, results: Path) -> dict[Cell, Record | None]:
        """{cell: its record, or None where it is not done}."""
        return {
            cell: read_record(run_directory(results, key))
            for cell, key in zip(self.table.cells, self.keys, strict=True)
        }

    def manifest(self) -> Manifest:
        """The manifest of the table."""
        places = (Place(*cell.place, key) for key, cell, _ in self.places())
        return Manifest(self.table.name, self.table.headlines, self.table.defaults, tuple(places))

    def jobs(self, pending: Iterable[Cell], results: Path) -> list[Job]:
        """The jobs for these cells, in the order that completes the first rows of the table early.

        What several of these cells share and is not stored yet (statistics, masks, fine-tuned weights) is a job of its
        own; what one cell needs alone is part of its job.
        """
        pending = set(pending)
        own = {cell: made for _, cell, made in self.places() if cell in pending}
        shared: dict[str, Job] = {}
        needed: dict[Cell, list[str]] = {cell: [] for cell in own}
        for kind in SHARED:
            for name, readers in _passes(own, kind, results).items():
                if len(readers) == 1:
                    continue
                stages = {stage.key: cell for cell, found in readers.items() for stage in found}
                files = {stage.key: stage.path(results) for found in readers.values() for stage in found}
                before = {job for cell in readers for job in needed[cell]}
                shared[name] = Job(
                    kind=kind,
                    configs=tuple(dict.fromkeys(cell.config for cell in stages.values())),
                    keys=tuple(stages),
                    files=tuple(files[key].relative_to(results) for key in stages),
                    after=tuple(sorted(before)),
                    name=name,
                    log=Path("cache") / kind / f"{name}.{LOG}",
                    label=_label(kind, list(readers)),
                )
                for cell in readers:
                    needed[cell].append(name)
        ordered: dict[str, Job] = {}
        for cell in schedule(own):
            for name in needed[cell]:
                ordered.setdefault(name, shared[name])
            record = own[cell].record
            ordered[record.key] = Job(
                kind="record",
                configs=(cell.config,),
                keys=(record.key,),
                files=(record.path(results).relative_to(results),),
                after=tuple(needed[cell]),
                name=record.key,
                log=Path("runs") / record.key / LOG,
                label=str(cell),
            )
        return list(ordered.values())


def plan(table: Table, known: Fingerprints) -> Plan:
    """The plan of a table.

    Raises:
        ConfigError: a name in a cell that is not known, files that cannot be read.
    """
    chains = []
    for cell in table.cells:
        try:
            chains.append(chain(cell.config, known))
        except OSError as error:
            raise ConfigError(f"{cell.where}: the models and data of a run cannot be read: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{cell.where}: {error}") from error
    first: dict[str, Cell] = {}
    for cell, found in zip(table.cells, chains, strict=True):
        if (other := first.setdefault(found.record.key, cell)) is not cell:
            raise ConfigError(f"{cell.where}: {cell} is the same run as {other}, which has another place in the table")
    return Plan(table, tuple(found.record.key for found in chains), tuple(chains))


def schedule(cells: Iterable[Cell]) -> list[Cell]:
    """The cells in the order that completes the first rows of a table early: dense rows, then row by row."""
    cells = list(cells)

    def rank(axis: Callable[[Cell], object]) -> dict[object, int]:
        return {value: i for i, value in enumerate(dict.fromkeys(axis(cell) for cell in cells))}

    axes: Sequence[Callable[[Cell], object]] = (
        lambda cell: cell.config.model,
        lambda cell: cell.label,
        lambda cell: cell.config.pruning.sparsity,
        lambda cell: cell.config.seed,
        lambda cell: cell.config.task.name,
    )
    ranks = [rank(axis) for axis in axes]
    return sorted(
        cells,
        key=lambda cell: (
            cell.config.pruning.method != DENSE,
            *(rank[axis(cell)] for axis, rank in zip(axes, ranks, strict=True)),
        ),
    )


def _passes(chains: dict[Cell, Chain], kind: str, results: Path) -> dict[str, dict[Cell, list[Stage]]]:
    """{pass: {cell: the stages that it reads of it}} of the stages that are not stored."""
    found: dict[str, dict[Cell, list[Stage]]] = {}
    for cell, own in chains.items():
        for stage in own.of_kind(kind):
            path = stage.path(results)
            if not (path.is_file() and read_note(path)):
                found.setdefault(stage.together, {}).setdefault(cell, []).append(stage)
    return found


def _label(kind: str, readers: Sequence[Cell]) -> str:
    first = readers[0]
    seed = f"seed {first.config.seed}"
    if kind == "statistics":
        return f"{first.config.model.name} {kind} {seed}"
    sparsities = dict.fromkeys(f"{100 * cell.config.pruning.sparsity:g}" for cell in readers)
    if kind == "tuned":
        return f"{first} fine-tuning"
    return f"{first.config.model.name} {first.label} {kind} at {', '.join(sparsities)} % {seed}"

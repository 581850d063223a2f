"""A plan: the graph of all artifacts of a table, each once, and the jobs that make what is missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vlprune.config import DENSE
from vlprune.store.artifacts import read_note
from vlprune.store.manifest import Manifest, Place
from vlprune.store.record import LOG, read_record, run_directory
from vlprune.sweep.cells import Cell, Table
from vlprune.sweep.job import Job

SHARED = ("statistics", "masks", "tuned")  # kinds of artifacts that several runs can have in common, in their order


def is_stored(path: Path) -> bool:
    """Whether an artifact is there, as far as can be told without reading it."""
    return path.is_file() and read_note(path) is not None


@dataclass(frozen=True)
class Artifact:
    """What a plan knows of a stage and its artifact.

    Attributes:
        kind: "statistics", "masks", "tuned" or "record".
        key: the digest of all that it depends on.
        together: the digest of what those that are made in one pass have in common.
        file: its file below the results directory.
        runs_model: whether making it runs a model.
    """

    kind: str
    key: str
    together: str
    file: Path
    runs_model: bool


@dataclass(frozen=True, eq=False)
class Run:
    """A run of a table.

    Attributes:
        cell: its settings, and its place in the table.
        artifacts: what is made for it and others may need too, in the order in which it is made; last its record.
    """

    cell: Cell
    artifacts: tuple[Artifact, ...]

    @property
    def key(self) -> str:
        """The key of its record."""
        return self.artifacts[-1].key

    @property
    def tuned(self) -> Artifact:
        """Its fine-tuned weights."""
        [found] = self.of_kind("tuned")
        return found

    def of_kind(self, kind: str) -> list[Artifact]:
        """The artifacts of a kind."""
        return [artifact for artifact in self.artifacts if artifact.kind == kind]

    def __str__(self) -> str:
        return str(self.cell)


@dataclass(frozen=True)
class Plan:
    """A table with what is made for each of its cells.

    Attributes:
        table: the table.
        runs: of its cells, in their order.
    """

    table: Table
    runs: tuple[Run, ...]

    @cached_property
    def by_key(self) -> dict[str, Run]:
        """{key of a record: its run}."""
        return {run.key: run for run in self.runs}

    def done(self, results: Path) -> set[str]:
        """The keys of the runs that are done."""
        return {run.key for run in self.runs if read_record(run_directory(results, run.key)) is not None}

    def manifest(self) -> Manifest:
        """The manifest of the table."""
        places = (Place(*run.cell.place, run.key) for run in self.runs)
        headlines, defaults = dict(self.table.headlines), {m: dict(own) for m, own in self.table.defaults.items()}
        return Manifest(self.table.name, headlines, defaults, tuple(places))

    def jobs(self, pending: Collection[Run], results: Path, stored: Callable[[Path], bool] = is_stored) -> list[Job]:
        """The jobs for these runs, in the order that completes the first rows of the table early.

        What several of them share and is not stored yet (statistics, masks, fine-tuned weights) is a job of its own;
        what one run needs alone is part of its job.

        Args:
            pending: the runs.
            results: the results directory.
            stored: whether an artifact is where all workers find it; in the results directory, where it is not given.
        """
        asked = set(pending)
        pending = [run for run in self.runs if run in asked]
        shared: dict[str, Job] = {}
        needed: dict[Run, list[str]] = {run: [] for run in pending}
        for kind in SHARED:
            for name, readers in _passes(pending, kind, results, stored).items():
                if len(readers) == 1:
                    continue
                configs = {artifact.key: run.cell.config for run, found in readers.items() for artifact in found}
                files = {artifact.key: artifact.file for found in readers.values() for artifact in found}
                shared[name] = Job(
                    kind=kind,
                    configs=tuple(dict.fromkeys(configs.values())),
                    keys=tuple(files),
                    files=tuple(files.values()),
                    after=tuple(sorted({job for run in readers for job in needed[run]})),
                    name=name,
                    log=Path("cache") / kind / f"{name}.{LOG}",
                    label=_label(kind, [run.cell for run in readers]),
                    runs_model=any(artifact.runs_model for found in readers.values() for artifact in found),
                )
                for run in readers:
                    needed[run].append(name)
        ordered: dict[str, Job] = {}
        for run in schedule(pending):
            for name in needed[run]:
                ordered.setdefault(name, shared[name])
            ordered[run.key] = Job(
                kind="record",
                configs=(run.cell.config,),
                keys=(run.key,),
                files=(run.artifacts[-1].file,),
                after=tuple(needed[run]),
                name=run.key,
                log=Path("runs") / run.key / LOG,
                label=str(run),
                runs_model=True,
            )
        return list(ordered.values())


def schedule(runs: Iterable[Run]) -> list[Run]:
    """The runs in the order that completes the first rows of a table early: dense rows, then row by row."""
    runs = list(runs)

    def rank(axis: Callable[[Cell], object]) -> Callable[[Cell], int]:
        ranks = {value: i for i, value in enumerate(dict.fromkeys(axis(run.cell) for run in runs))}
        return lambda cell: ranks[axis(cell)]

    axes = (
        rank(lambda cell: cell.config.model),
        rank(lambda cell: cell.label),
        rank(lambda cell: cell.config.pruning.sparsity),
        rank(lambda cell: cell.config.seed),
        rank(lambda cell: cell.config.task.name),
    )
    return sorted(runs, key=lambda run: (run.cell.config.pruning.method != DENSE, *(place(run.cell) for place in axes)))


def _passes(
    pending: Iterable[Run], kind: str, results: Path, stored: Callable[[Path], bool]
) -> dict[str, dict[Run, list[Artifact]]]:
    """{pass: {run: the artifacts that it reads of it}} of the artifacts that are not stored."""
    there: dict[Path, bool] = {}
    found: dict[str, dict[Run, list[Artifact]]] = {}
    for run in pending:
        for artifact in run.of_kind(kind):
            if artifact.file not in there:
                there[artifact.file] = stored(results / artifact.file)
            if not there[artifact.file]:
                found.setdefault(artifact.together, {}).setdefault(run, []).append(artifact)
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

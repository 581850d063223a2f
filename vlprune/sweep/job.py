"""A job: what a worker gets to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlprune.config import RunConfig


@dataclass(frozen=True)
class Job:
    """Stages of one kind that a worker makes in one go.

    Attributes:
        kind: "record" for a whole run, or "statistics", "masks" or "tuned" for what several runs share.
        configs: the runs whose stages of that kind are wanted; one for a record.
        keys: the keys of those stages when they were planned.
        files: the files of their artifacts, below the results directory.
        after: names of the jobs that must be done before.
        name: what other jobs know it by; of a record its key.
        log: the file below the results directory that its output goes to.
        label: what it is, for people.
        runs_model: whether it runs a model, which a GPU is good for.
    """

    kind: str
    configs: tuple[RunConfig, ...]
    keys: tuple[str, ...]
    files: tuple[Path, ...]
    after: tuple[str, ...]
    name: str
    log: Path
    label: str
    runs_model: bool

    def __str__(self) -> str:
        return self.label

    @property
    def is_run(self) -> bool:
        """Whether it ends with the record of a run."""
        return self.kind == "record"

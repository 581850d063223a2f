"""Execution: how and where runs are made, which never changes what comes out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from vlprune.config import ConfigError, unknown

URL = re.compile(r"[a-z0-9]+://[^/].*|file:///.+")
KeepWeights = Literal["all", "best", "none"]
TRACKERS = ("tensorboard", "wandb")  # and the packages that they are


class Interrupted(Exception):
    """Work that was asked to stop, and that can go on later from what it stored."""


def never() -> bool:
    """Always False: the `stopping` of work that nobody can ask to stop."""
    return False


@dataclass(frozen=True)
class Execution:
    """How and where the stages of runs are made; no key depends on it.

    Attributes:
        store: the results directory, which artifacts and records go to; None: artifacts stay in memory and go with the
            process.
        device: torch's name of the device that models run on; None: a CUDA device where there is one, else the CPU.
        workers: loader processes that read and augment training images, and threads that open those of calibration and
            evaluation ahead (0: the run's own process does, when it needs them).
        memory_limit: bytes of gradient rows (chita, chita++) that stay in memory; more go to disk.
        spill: directory for gradient rows on disk; None: beside the other artifacts of the store, or the system's
            directory for temporary files where there is no store.
        skip_broken: leave out images that are missing or cannot be read instead of failing. Which ones were left out is
            part of the key of everything made from the others.
        keep_weights: which fine-tuned weights stay on disk: "all", of the seeds of each row of a table the "best" by
            the headline metric, or "none", which never writes them. None, the default, keeps them until the predictions
            made with them are stored.
        checkpoint_seconds: time between two checkpoints of fine-tuning, in seconds.
        remote: URL of an object store, such as "s3://BUCKET/PREFIX", that the store is a mirror of: what is not in the
            store is looked for there first, and what is made is copied there. None: the store alone.
        track: names of TRACKERS that show losses and metrics.
    """

    store: Path | None = Path("results")
    device: str | None = None
    workers: int = 0
    memory_limit: int = 2 << 30
    spill: Path | None = None
    skip_broken: bool = False
    keep_weights: KeepWeights | None = None
    checkpoint_seconds: float = 180.0
    remote: str | None = None
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("workers", "memory_limit", "checkpoint_seconds"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be finite and at least 0, got {value}")
        if self.workers > 1024:
            raise ConfigError(f"workers, which are processes, must be at most 1024, got {self.workers}")
        if self.remote is not None and (self.store is None or not URL.fullmatch(self.remote)):
            raise ConfigError(f"remote must be a URL such as s3://BUCKET/PREFIX beside a store, got {self.remote!r}")

        for name in self.track:
            if name not in TRACKERS:
                raise ConfigError(unknown("tracker", name, TRACKERS))
            # A directory of that name, such as wandb makes, is found as well, without a file that it comes from.
            if (package := find_spec(name)) is None or package.origin is None:
                raise ConfigError(f"tracking with {name} needs {name}: pip install 'vlprune[track]'")
            if self.store is None:
                raise ConfigError(f"tracking with {name} needs a store")

    @property
    def spill_directory(self) -> Path | None:
        """The directory for gradient rows on disk; None: the system's for temporary files."""
        return self.spill or (None if self.store is None else self.store / "cache")


def gibibytes(number: float, option: str) -> int:
    """The bytes of a number of GiB that an option of a command line gives.

    Raises:
        ConfigError: a number that is not finite, below 0 or beyond any memory.
    """
    if not 0 <= number < 2**30:
        raise ConfigError(f"{option} must be a number of GiB, finite and at least 0, got {number:g}")
    return round(number * 2**30)

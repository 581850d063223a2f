"""The options of `python -m vlprune.sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlprune.config import ConfigError
from vlprune.execution import Execution, KeepWeights, gibibytes
from vlprune.sweep.given import Given

QUICKSTART = Path("experiments") / "quickstart.toml"


@dataclass(frozen=True)
class Options(Given):
    """Runs what is not done yet of a table of results, and prints the table. Lists are separated by commas.

    Attributes:
        table: the table's TOML file; the quickstart where none is given.
        data: data directory, for tables on real data.
        skip_broken: leave out images that are missing or cannot be read, and list them at the end.
        jobs: runs at once; the number of GPUs, or of cores where there are none, where it is not given.
        engine: where they run: in worker processes of this machine, or on a Ray cluster.
        address: address of the Ray cluster; $RAY_ADDRESS, else this machine alone, where it is not given.
        loader_workers: processes of each worker that read the training images, and threads that open those of
            calibration and evaluation ahead; they change no numbers.
        dry_run: only say what would run and what is done.
        status: only say what is done, who is at work on what, and what failed; also while a sweep runs elsewhere.
        verify: only compare every file of the results directory with what was stored; the table does not count.
        shard: K/N, do the K-th of N parts of the table, for arrays of N jobs; parts share what they have in common.
        retry_failed: of the runs that are not done, only do those that failed before.
        results: the results directory.
        memory_limit: GiB of gradient rows (chita, chita++) that a worker keeps in memory; more go to disk.
        spill: directory for gradient rows on disk; the cache of the results where it is not given.
        keep_weights: which fine-tuned weights stay in the results directory: all, of the seeds of each row the best, or
            none; where it is not given, until the predictions made with them are stored.
        checkpoint_seconds: time between two checkpoints of fine-tuning, from which it goes on after a kill.
        remote: URL of an object store, such as s3://BUCKET/PREFIX, that the results directory is a mirror of; for
            machines that share no file system.
        track: where losses and metrics are shown, too: tensorboard, wandb.
    """

    table: Annotated[Path | None, tyro.conf.Positional] = None
    data: Path | None = None
    skip_broken: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    jobs: int | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    loader_workers: int = 0
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    status: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    shard: str | None = None
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    results: Path = Path("results")
    memory_limit: float = Execution.memory_limit / 2**30
    spill: Path | None = None
    keep_weights: KeepWeights | None = None
    checkpoint_seconds: float = Execution.checkpoint_seconds
    remote: str | None = None
    track: str | None = None

    @property
    def execution(self) -> Execution:
        """How and where the runs are made.

        Raises:
            ConfigError: a number that is not finite or below 0; a tracker that is not known or not installed.
        """
        return Execution(
            store=self.results,
            workers=self.loader_workers,
            memory_limit=gibibytes(self.memory_limit, "--memory-limit"),
            spill=self.spill,
            skip_broken=self.skip_broken,
            keep_weights=self.keep_weights,
            checkpoint_seconds=self.checkpoint_seconds,
            remote=self.remote,
            track=tuple(part.strip() for part in (self.track or "").split(",") if part.strip()),
        )


def quickstart() -> Path:
    """The quickstart's TOML file: of the working directory, else of the clone that this package is in.

    Raises:
        ConfigError: it is in neither.
    """
    for root in (Path(), Path(__file__).resolve().parents[2]):
        if (root / QUICKSTART).is_file():
            return root / QUICKSTART
    raise ConfigError(f"there is no {QUICKSTART} here; run this in a clone of vlprune, or name a TABLE.toml")


def parse_shard(text: str | None) -> tuple[int, int]:
    """(number of the part from 0, number of parts) of K/N."""
    if text is None:
        return 0, 1
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--shard must be K/N with K from 1 to N, such as 3/8, got {text!r}")
    return int(part) - 1, int(parts)

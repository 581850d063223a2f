"""Where faults strike: directories that a small real sweep runs in, and what must be there afterwards."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vlprune.data import drawn
from vlprune.data.scenes import SCENES
from vlprune.masks import mask_hash
from vlprune.models import load_model, save_model
from vlprune.reports.frame import RESULTS
from vlprune.store.lease import SUFFIX as LEASE
from vlprune.store.masks import load_masks
from vlprune.store.record import RECORD, read_record
from vlprune.store.verify import verify

TABLE = """
[base.calibration]
n_batches = 2
batch_size = 4
[base.finetuning]
steps = 12
batch_size = 4
[task.captioning]
task.options.max_length = 8
[[grid]]
models = ["model"]
methods = ["multiflow", "snip"]
sparsities = [0.75]
tasks = ["retrieval", "captioning", "vqa"]
"""
SWEEP = ["-m", "vlprune.sweep", "faults.toml", "--data", "data", "--limit", "12", "--checkpoint-seconds", "0"]
STAGES = ("statistics", "masks", "tuned", "predictions", "runs")  # the directories that leases of a stage are in
TIMEOUT = 600.0  # seconds after which a command counts as one that never ends


@dataclass
class Ground:
    """A directory with a model, data and results of its own, which sweeps run in and faults strike.

    Attributes:
        root: the directory.
        draw: random numbers.
        damaged: files of the results, below them, whose content a fault has changed.
    """

    root: Path
    draw: random.Random
    damaged: set[Path] = field(default_factory=set)

    @property
    def results(self) -> Path:
        return self.root / "results"

    def files(self) -> list[Path]:
        """The files of the results, below them; what is deleted meanwhile is not among them."""
        return sorted(path.relative_to(self.results) for path in self.results.rglob("*") if path.is_file())

    def records(self) -> dict[Path, bytes]:
        """{file below the results: content} of all records."""
        paths = [path for path in self.files() if path.name == RECORD]
        return {path: (self.results / path).read_bytes() for path in paths}

    def stage(self) -> str:
        """The earliest stage that any process is at work on, as the leases tell; "" where none is."""
        held = {path.parts[0] if path.parts[0] != "cache" else path.parts[1] for path in self._leases()}
        return next((stage for stage in STAGES if stage in held), "")

    def _leases(self) -> list[Path]:
        return [path.relative_to(self.results) for path in self.results.rglob(f"*{LEASE}")]


@dataclass
class Command:
    """A sweep that runs.

    Attributes:
        process: the process that was started; its group is its own.
        clock: the file that its clock reads its offset from.
    """

    process: subprocess.Popen[str]
    clock: Path

    def workers(self) -> list[psutil.Process]:
        """The processes below it."""
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [each for each in below if "resource_tracker" not in " ".join(words_of(each))]
        return []

    def group(self) -> list[psutil.Process]:
        """All processes that belong to it, also when it has ended itself."""
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(each.pid) == self.process.pid and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
        return found


def words_of(process: psutil.Process) -> list[str]:
    """The command line of a process, which may have ended."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _environment(ground: Ground, clock: str) -> tuple[dict[str, str], Path]:
    """The environment of a sweep, with a clock that can be moved by a file where a library for that is named."""
    file = ground.root / "clock"
    file.write_text("+0\n")
    own = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    if clock:
        own |= {"LD_PRELOAD": clock, "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1"}
        own |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return own, file


def begun(ground: Ground, *, clock: str = "", room: int | None = None, jobs: int = 2) -> Command:
    """A sweep, in a group of its own.

    Args:
        ground: where.
        clock: the library that moves its clock; "": it has the machine's.
        room: bytes that are free on the disk of its results, which then is one of its own; None: as many as there are.
        jobs: runs at once.
    """
    environment, file = _environment(ground, clock)
    command = [sys.executable, *SWEEP, "--jobs", str(jobs)]
    if room is None:
        words = command
    else:
        inside = shlex.join(command)
        disk = sum((ground.results / path).stat().st_blocks * 512 for path in ground.files()) + room
        script = (
            f"mkdir -p results disk && mount -t tmpfs -o size={disk} none disk && cp -a results/. disk/; "
            f"{inside} --results disk; code=$?; rm -rf results && cp -a disk results; exit $code"
        )
        words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    output = (ground.root / "output.txt").open("a", encoding="utf-8")
    with output:
        process = subprocess.Popen(
            words, cwd=ground.root, env=environment, stdout=output, stderr=output, text=True, start_new_session=True
        )
    return Command(process, file)


def prepared(root: Path, draw: random.Random) -> Ground:
    """A directory with model, data and table."""
    save_model(load_model("tiny-xvlm"), root / "model")
    drawn.write(root / "data", SCENES)
    (root / "faults.toml").write_text(TABLE)
    return Ground(root, draw)


@dataclass(frozen=True)
class Whole:
    """A sweep that nothing struck.

    Attributes:
        files: the files of its results, below them.
        contents: {file: what it says} of those that say the same however they were made.
        numbers: {file of a record: what it measured}.
        seconds: how long it took.
    """

    files: frozenset[Path]
    contents: dict[Path, bytes]
    numbers: dict[Path, Any]
    seconds: float


def whole(ground: Ground) -> Whole:
    """Sweeps a ground that nothing strikes."""
    began = time.monotonic()
    assert begun(ground).process.wait(TIMEOUT) == 0, (ground.root / "output.txt").read_text()
    seconds, files = time.monotonic() - began, ground.files()
    tables = [path for path in files if path.parts[0] == "tables" and not path.name.endswith(RESULTS)]  # has seconds
    same = [*(path for path in files if path.suffix in (".safetensors", ".jsonl")), *tables]
    contents = {path: _content(ground.results / path) for path in same}
    return Whole(frozenset(files), contents, {path: _numbers(ground, path) for path in ground.records()}, seconds)


def _content(path: Path) -> Any:
    """What a file says; the header of a bundle of masks says it in any order."""
    return mask_hash(load_masks(path)) if path.parent.name == "masks" else path.read_bytes()


def _numbers(ground: Ground, path: Path) -> Any:
    record = read_record((ground.results / path).parent)
    return record and (record.metrics, record.floors, record.sparsity, record.layers)


def wrong_records(ground: Ground, before: dict[Path, bytes], expected: Whole) -> Iterator[tuple[str, str]]:
    """("lost" or "wrong", what) of records after a command."""
    for path, content in before.items():
        file = ground.results / path
        struck = path in ground.damaged or path.with_name(f"{path.name}.note") in ground.damaged
        if not struck and (not file.is_file() or file.read_bytes() != content):
            yield "lost", f"{path} is not what it was"
    for path in ground.records():
        numbers = _numbers(ground, path)
        if numbers is not None and numbers != expected.numbers.get(path):
            yield "wrong", f"{path} says {numbers}"


def wrong_files(ground: Ground, expected: Whole) -> Iterator[tuple[str, str]]:
    """("lost", "wrong" or "left over", what) of a finished table."""
    found = set(ground.files())
    told = " ".join(verify(ground.results).faults)
    for path in sorted(found - expected.files):
        yield "left over", str(path)
    for path in sorted(expected.files - found):
        if str(path) not in told and path not in ground.damaged:
            yield "lost", str(path)
    for path, content in expected.contents.items():
        if path in found and str(path) not in told and _content(ground.results / path) != content:
            yield "wrong", str(path)
    for path in expected.numbers:
        if _numbers(ground, path) is None:
            yield "lost", f"{path} is not there, and the sweep says that it is done"

"""Whether a sweep loses anything: `python experiments/benchmarks/faults.py`.

One small table, everything in it real (a dense and two pruned models, three tasks), is swept again and again, and a
fault strikes each command at a random moment, or several do, until enough have. After every command each record that
was there before must be there, byte for byte, and say the numbers of a sweep that nothing struck. After every finished
table its files must be those of that sweep: none missing, none left over, and no process. Writes
results/benchmarks/faults.md; ends with 1 where anything was lost, wrong or left over. 300 faults take an hour on two
cores, and 3 GB.

Linux. A full disk needs user namespaces (`unshare -Ur`), a clock that jumps needs libfaketime (Debian: faketime); what
is missing is named and not tried.
"""

from __future__ import annotations

import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro
from PIL import Image

from vlprune.data import scenes
from vlprune.masks import mask_hash
from vlprune.models import load_model, save_model
from vlprune.store.lease import SUFFIX as LEASE
from vlprune.store.masks import load_masks
from vlprune.store.record import ERROR, LOG, RECORD, read_record
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
GRACE = 60.0  # seconds in which what a killed sweep has started ends
UNCHECKED = {LOG, ERROR, "losses.csv"}  # said for people; nothing reads them
CLOCK = "libfaketimeMT.so.1"
REPORT = Path(__file__).parents[2] / "results" / "benchmarks" / "faults.md"


class Missed(Exception):
    """There was nothing to strike at that moment."""


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
            return [each for each in below if "resource_tracker" not in " ".join(_words(each))]
        return []

    def group(self) -> list[psutil.Process]:
        """All processes that belong to it, also when it has ended itself."""
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(each.pid) == self.process.pid and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
        return found


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


# ---- faults: each strikes once ----


def sweep_killed(_: Ground, command: Command) -> None:
    command.process.kill()


def group_killed(_: Ground, command: Command) -> None:
    os.killpg(command.process.pid, signal.SIGKILL)


def worker_killed(ground: Ground, command: Command) -> None:
    _worker(ground, command).kill()


def sweep_terminated(_: Ground, command: Command) -> None:
    command.process.terminate()


def worker_terminated(ground: Ground, command: Command) -> None:
    _worker(ground, command).terminate()


def interrupted(_: Ground, command: Command) -> None:
    """Ctrl-C, which a terminal sends to the whole group."""
    os.killpg(command.process.pid, signal.SIGINT)


def worker_hangs(ground: Ground, command: Command) -> None:
    worker = _worker(ground, command)
    worker.suspend()
    time.sleep(ground.draw.uniform(1, 4))
    worker.resume() if ground.draw.random() < 0.5 else worker.kill()


def sweep_hangs(ground: Ground, command: Command) -> None:
    own = psutil.Process(command.process.pid)
    own.suspend()
    time.sleep(ground.draw.uniform(1, 4))
    own.resume()


def out_of_memory(ground: Ground, command: Command) -> None:
    """From now on a worker gets next to no memory."""
    worker = _worker(ground, command)
    most = worker.memory_info().vms + ground.draw.randrange(8 << 20)
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (most, most))


def file_damaged(ground: Ground, _: Command) -> None:
    """A bit is flipped in place, or the file is cut short, emptied or deleted."""
    files = [path for path in ground.files() if path.name not in UNCHECKED and path.suffix != LEASE]
    if not files:
        raise Missed
    own = ground.draw.choice(files)
    path, how = ground.results / own, ground.draw.choice(("flip", "flip", "cut", "empty", "delete"))
    try:
        with path.open("rb+") as file:
            size = os.fstat(file.fileno()).st_size
            if how == "flip" and size:
                place = ground.draw.randrange(size)
                file.seek(place)
                [byte] = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ 1 << ground.draw.randrange(8)]))
            elif how == "cut":
                file.truncate(size // 2)
            elif how == "empty":
                file.truncate(0)
            else:
                path.unlink()
    except FileNotFoundError:
        raise Missed from None
    ground.damaged.add(own)


def input_replaced(ground: Ground, _: Command) -> None:
    """An image, the captions or the weights are others for a moment."""
    choices = (_other_image, _other_captions, _other_weights)
    path, other = ground.draw.choice(choices)(ground)
    away = path.with_name(f"{path.name}.away")
    path.rename(away)
    other.rename(path)
    time.sleep(ground.draw.choice((0.0, 0.5, 3.0)))
    away.replace(path)


def _other_image(ground: Ground) -> tuple[Path, Path]:
    path, other = ground.root / "data" / "images" / "000001.png", ground.root / "other.png"
    Image.open(path).rotate(90).save(other)
    return path, other


def _other_captions(ground: Ground) -> tuple[Path, Path]:
    path, other = ground.root / "data" / "dataset_scenes.json", ground.root / "other.json"
    other.write_text(path.read_text().replace("a ", "one "))
    return path, other


def _other_weights(ground: Ground) -> tuple[Path, Path]:
    path, other = ground.root / "model" / "model.safetensors", ground.root / "other.safetensors"
    content = bytearray(path.read_bytes())
    content[-1 - ground.draw.randrange(1000)] ^= 1
    other.write_bytes(content)
    return path, other


def clock_jumps(ground: Ground, command: Command) -> None:
    """Some hours, days or years, forwards or back."""
    hours = ground.draw.choice((1, 30, 9000)) * ground.draw.choice((1, -1))
    command.clock.write_text(f"{hours:+}h\n")


def _worker(ground: Ground, command: Command) -> psutil.Process:
    workers = command.workers()
    if not workers:
        raise Missed
    return ground.draw.choice(workers)


Fault = Callable[[Ground, Command], None]
STRIKES: dict[str, Fault] = {
    "the sweep killed (SIGKILL)": sweep_killed,
    "the sweep and all its workers killed": group_killed,
    "a worker killed": worker_killed,
    "the sweep asked to stop (SIGTERM)": sweep_terminated,
    "a worker asked to stop": worker_terminated,
    "Ctrl-C": interrupted,
    "a worker hangs (SIGSTOP), then goes on or is killed": worker_hangs,
    "the sweep hangs, then goes on": sweep_hangs,
    "a worker out of memory": out_of_memory,
    "a file of the results damaged": file_damaged,
    "an image, captions or weights replaced for a moment": input_replaced,
}
SECOND, FULL, JUMP = "a second sweep begun", "the disk full", "the clock jumps"
PROBLEMS = ("lost", "wrong", "left over")


# ---- sweeps ----


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
    scenes.write(root / "data")
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
    same = [path for path in files if path.suffix in (".safetensors", ".jsonl") or path.parts[0] == "tables"]
    contents = {path: _content(ground.results / path) for path in same}
    return Whole(frozenset(files), contents, {path: _numbers(ground, path) for path in ground.records()}, seconds)


def _content(path: Path) -> Any:
    """What a file says; the header of a bundle of masks says it in any order."""
    return mask_hash(load_masks(path)) if path.parent.name == "masks" else path.read_bytes()


def _numbers(ground: Ground, path: Path) -> Any:
    record = read_record((ground.results / path).parent)
    return record and (record.metrics, record.floors, record.sparsity, record.layer_sparsity)


# ---- what is wrong afterwards ----


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


# ---- the campaign ----


@dataclass
class Tally:
    """What has happened so far, on all grounds.

    Attributes:
        wanted: number of faults to try.
        strikes: {fault: {stage: number of times it struck while that was made}}.
        problems: (kind, what) of all that was lost, wrong or left over.
        commands: number of sweeps.
        tables: number of tables that were finished.
        records: number of times that a record was compared.
    """

    wanted: int
    strikes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[tuple[str, str]] = field(default_factory=list)
    commands: int = 0
    tables: int = 0
    records: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def note(self, fault: str, stage: str) -> None:
        with self.guard:
            self.strikes[fault][stage] += 1

    @property
    def total(self) -> int:
        return sum(own.total() for own in self.strikes.values())

    def enough(self) -> bool:
        return self.total >= self.wanted


def campaign(ground: Ground, expected: Whole, tally: Tally, more: dict[str, str]) -> None:
    """Sweeps and strikes until enough faults have struck, and then without faults to the end of the table."""
    while not tally.enough():
        while not _one_command(ground, expected, tally, more):
            pass
        shutil.rmtree(ground.results)
        ground.damaged.clear()


def _one_command(ground: Ground, expected: Whole, tally: Tally, more: dict[str, str]) -> bool:
    """Whether the table is finished, after a sweep that was struck, unless enough were."""
    before, problems = ground.records(), list[tuple[str, str]]()
    struck, codes = (
        ([], [_ended(begun(ground), problems)]) if tally.enough() else _struck(ground, expected, tally, more, problems)
    )
    problems += wrong_records(ground, before, expected)
    done = 0 in codes
    if done:  # what a killed one of two has left is cleaned up by the next
        codes.append(_ended(begun(ground), problems))
        problems += wrong_files(ground, expected)
    with tally.guard:
        tally.commands += len(codes)
        tally.tables += done
        tally.records += len(ground.records())
        tally.problems += [(problem, f"{what} ({', '.join(struck)})") for problem, what in problems]
        print(
            f"{tally.total} faults, {tally.tables} tables, {len(tally.problems)} problems: {codes} {', '.join(struck)}",
            flush=True,
        )
        for problem, what in problems:
            print(f"  {problem}: {what}", flush=True)
        if problems:
            print((ground.root / "output.txt").read_text()[-3000:], flush=True)
    (ground.root / "output.txt").write_text("")
    return done


def _struck(
    ground: Ground, expected: Whole, tally: Tally, more: dict[str, str], problems: list[tuple[str, str]]
) -> tuple[list[str], list[int | None]]:
    """The faults that struck a sweep, and how it ended, or both where a second one was begun."""
    draw, struck = ground.draw, list[str]()
    kind = draw.choice([*STRIKES, SECOND, *more])
    if kind == FULL:
        code = _ended(begun(ground, room=draw.randrange(8 << 20)), problems)
        if (stage := _full_at(ground)) is not None:
            tally.note(FULL, stage)
            struck.append(FULL)
        return struck, [code]
    commands = [begun(ground, clock=more[JUMP] if kind == JUMP else "")]
    missing = 1 - len(ground.records()) / len(expected.numbers)
    faults: dict[str, Fault] = {**STRIKES, SECOND: lambda ground, _: commands.append(begun(ground)), JUMP: clock_jumps}
    for fault in [kind, *draw.sample(list(STRIKES), draw.randint(0, 2))]:
        with suppress(subprocess.TimeoutExpired):
            commands[0].process.wait(draw.uniform(0, 3 + expected.seconds * missing) / 2)
        stage = ground.stage()
        if commands[0].process.poll() is not None:
            break
        with suppress(Missed, psutil.NoSuchProcess, ProcessLookupError):
            faults[fault](ground, commands[0])
            tally.note(fault, stage)
            struck.append(fault)
    return struck, [_ended(command, problems) for command in commands]


def _ended(command: Command, problems: list[tuple[str, str]]) -> int | None:
    """How a sweep ended, with all that it has started."""
    try:
        command.process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        problems.append(("left over", f"a sweep that does not end: {command.process.pid}"))
    end = time.monotonic() + GRACE
    while (left := command.group()) and time.monotonic() < end:
        time.sleep(0.2)
    for each in left:
        problems.append(("left over", f"process {each.pid}: {' '.join(_words(each))}"))
        with suppress(psutil.Error):
            each.kill()
    return command.process.poll()


def _full_at(ground: Ground) -> str | None:
    """The stage whose file had no room; None where the disk was large enough."""
    text = (ground.root / "output.txt").read_text()
    _, found, rest = text.rpartition("No space left on device")
    if not found:
        return None
    path = rest.split("'")[1] if rest.count("'") > 1 else ""
    return next((stage for stage in STAGES if f"/{stage}/" in path), "")


# ---- several sweeps at once ----


def shared(ground: Ground, expected: Whole, number: int) -> tuple[int, int, bool]:
    """(trainings that were begun, trainings that were needed, whether all is as of one sweep) of so many at once."""
    commands, problems = [begun(ground, jobs=1) for _ in range(number)], list[tuple[str, str]]()
    codes = [_ended(command, problems) for command in commands]
    text = "".join(path.read_text() for path in ground.results.rglob(f"*{LOG}"))
    problems += [*wrong_records(ground, {}, expected), *wrong_files(ground, expected)]
    tables = (ground.root / "output.txt").read_text().count(f"{len(expected.numbers)} runs finished")
    print(f"{number} sweeps at once: {codes}, {tables} whole tables, {problems}", flush=True)
    shutil.rmtree(ground.results)
    whole_tables = tables == number and codes == [0] * number
    return text.count("fine-tuning begins"), len(expected.numbers), whole_tables and not problems


# ---- the report ----


def report(tally: Tally, expected: Whole, sharing: dict[int, tuple[int, int, bool]], not_tried: list[str]) -> str:
    """The Markdown of results/benchmarks/faults.md."""
    names = {"": "starting, printing", "tuned": "fine-tuning", "runs": "record"}
    stages = [*STAGES, ""]
    lines = [
        "# Faults",
        "",
        f"`python experiments/benchmarks/faults.py`: {tally.total} faults in {tally.commands} sweeps of "
        f"{len(expected.numbers)} runs, {tally.tables} tables finished, each compared with that of a sweep that "
        f"nothing struck; records compared {tally.records} times.",
        "",
        "| lost | wrong | left over |",
        "|--:|--:|--:|",
        f"| {' | '.join(str(sum(kind == own for own, _ in tally.problems)) for kind in PROBLEMS)} |",
        "",
        "Which fault struck how often, by the earliest stage that was at work then:",
        "",
        f"| fault | {' | '.join(names.get(stage, stage) for stage in stages)} | all |",
        f"|---|{'--:|' * (len(stages) + 1)}",
    ]
    for fault, own in sorted(tally.strikes.items(), key=lambda item: -item[1].total()):
        lines.append(f"| {fault} | {' | '.join(str(own[stage] or '') for stage in stages)} | {own.total()} |")
    lines += ["", *(f"Not tried: {why}." for why in not_tried), *([""] if not_tried else [])]
    lines += ["Sweeps of one table begun at once, on one results directory, a worker each:", ""]
    lines += ["| sweeps | trainings needed | trainings begun | tables as of one sweep |", "|--:|--:|--:|---|"]
    lines += [
        f"| {n} | {needed} | {begun} | {'all' if alike else 'no'} |" for n, (begun, needed, alike) in sharing.items()
    ]
    return "\n".join(lines) + "\n"


def available() -> tuple[dict[str, str], list[str]]:
    """{fault that needs something of the machine: what}, and why others cannot be tried."""
    found, missing = {}, []
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") and subprocess.run(words, capture_output=True).returncode == 0:
        found[FULL] = "unshare"
    else:
        missing.append(f"{FULL}, which needs user namespaces")
    libraries = sorted(str(path) for root in (Path("/usr/lib"), Path("/usr/local/lib")) for path in root.rglob(CLOCK))
    if libraries:
        found[JUMP] = libraries[0]
    else:
        missing.append(f"{JUMP}, which needs {CLOCK}")
    return found, missing


@dataclass(frozen=True)
class Settings:
    """Strikes sweeps with faults and compares what is left with a sweep that nothing struck.

    Attributes:
        faults: number of faults.
        at_once: number of tables that are swept and struck at a time, each in a directory of its own.
        seed: seed of the faults; their moments differ all the same.
        sharing: numbers of sweeps that are begun at once on one directory.
        directory: where; a temporary directory where it is not given.
        out: the file for the report.
    """

    faults: int = 300
    at_once: int = 1
    seed: int = 0
    sharing: tuple[int, ...] = (2, 3, 8)
    directory: Path | None = None
    out: Path = REPORT


def main(arguments: list[str] | None = None) -> int:
    """Writes the report; the exit code."""
    options = tyro.cli(Settings, args=arguments)
    more, not_tried = available()
    tally = Tally(options.faults)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        roots = [Path(directory) / str(number) for number in range(options.at_once)]
        grounds = [prepared(root, random.Random(f"{options.seed} {n}")) for n, root in enumerate(roots)]
        expected = whole(grounds[0])
        shutil.rmtree(grounds[0].results)
        sharing = {number: shared(grounds[0], expected, number) for number in options.sharing}
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(lambda ground: campaign(ground, expected, tally, more), grounds))
    options.out.write_text(report(tally, expected, sharing, not_tried), encoding="utf-8")
    print(options.out.read_text())
    return 1 if tally.problems or not all(alike for _, _, alike in sharing.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

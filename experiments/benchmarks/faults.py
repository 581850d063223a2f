"""Whether a sweep loses anything: `python experiments/benchmarks/faults.py`.

One small table, everything in it real (a dense and two pruned models, three tasks), is swept again and again, and a
fault strikes each command at a random moment, or several do, until enough have. After every command each record that
was there before must be there, byte for byte, and say the numbers of a sweep that nothing struck. After every finished
table its files must be those of that sweep: none missing, none left over, and no process. Writes
results/benchmarks/faults.md; ends with 1 where anything was lost, wrong or left over. Takes hours, and 3 GB of memory
for each table that is swept at a time.

Linux. A full disk needs user namespaces (`unshare -Ur`), a clock that jumps needs libfaketime (Debian: faketime); what
is missing is named and not tried.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import tyro
from grounds import (
    STAGES,
    TIMEOUT,
    Command,
    Ground,
    Whole,
    begun,
    prepared,
    whole,
    words_of,
    wrong_files,
    wrong_records,
)
from strikes import STRIKES, Fault, Missed, clock_jumps

from vlprune.store.record import LOG

GRACE = 60.0  # seconds in which what a killed sweep has started ends
CLOCK = "libfaketimeMT.so.1"
REPORT = Path(__file__).parents[2] / "results" / "benchmarks" / "faults.md"
SECOND, FULL, JUMP = "a second sweep begun", "the disk full", "the clock jumps"
PROBLEMS = ("lost", "wrong", "left over")


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
        problems.append(("left over", f"process {each.pid}: {' '.join(words_of(each))}"))
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
    (ground.root / "output.txt").write_text("")
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
        with ThreadPoolExecutor(options.at_once) as pool:
            expected = list(pool.map(whole, grounds))  # each its own: a plan is kept under its directory's name
            for ground in grounds:
                shutil.rmtree(ground.results)
            sharing = {number: shared(grounds[0], expected[0], number) for number in options.sharing}
            list(pool.map(lambda ground, own: campaign(ground, own, tally, more), grounds, expected))
    options.out.write_text(report(tally, expected[0], sharing, not_tried), encoding="utf-8")
    print(options.out.read_text())
    return 1 if tally.problems or not all(alike for _, _, alike in sharing.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

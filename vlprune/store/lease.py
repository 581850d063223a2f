"""Leases: what one worker makes, no other makes meanwhile, in whatever process, container or host it is.

A lease is a file beside what is made. Whoever creates it holds it, and writes into it, every few seconds, what he does.
Nobody needs locks of the file system or clocks that agree: a lease is stale when whoever waits for it has seen it
unchanged for a minute of his own time. If two should ever hold one lease, the same work is done twice, and well.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlprune.execution import Interrupted, never
from vlprune.store.doing import doing
from vlprune.store.place import ended, place

logger = logging.getLogger(__name__)

SUFFIX = ".lease"
BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one, after which a lease is taken over
PATIENCE = 5.0  # seconds of waiting that nobody needs to hear of
POLL = 0.2


class Busy(Exception):
    """Somebody else is at work on an artifact; the message is who."""


class Sign(NamedTuple):
    """What a lease looks like; one of a holder that lives changes.

    Attributes:
        token: that of its holder; "" where it cannot be read.
        changed: time of its last change, in nanoseconds.
        holder: who holds it, in words.
        gone: whether the holder is known to have ended.
        since: when the holder took it, in seconds since 1970 by his clock.
        doing: what the holder said last that he does.
    """

    token: str
    changed: int
    holder: str
    gone: bool
    since: float = 0.0
    doing: str = ""


@dataclass
class _Held:
    """A lease of this process: who of its threads holds it, how often, under which token."""

    token: str
    thread: int
    count: int = 1


_held: dict[Path, _Held] = {}
_signs: dict[Path, tuple[Sign, float]] = {}  # what others' leases looked like, and since when, by our own clock
_guard = threading.Lock()
_beating: threading.Thread | None = None


@contextmanager
def claimed(paths: Iterable[Path], stopping: Callable[[], bool] = never) -> Iterator[None]:
    """While inside, nobody else makes any of these artifacts; waits for whoever does, and says so.

    A thread may claim again what it holds.

    Args:
        paths: files of the artifacts.
        stopping: whether the process was asked to stop.

    Raises:
        Interrupted: the process was asked to stop while it waited.
        OSError: a lease cannot be written.
    """
    with ExitStack() as stack:
        for path in sorted(set(paths)):  # in one order everywhere, so that two processes never wait for each other
            began, said = time.monotonic(), False
            while (sign := _claim(path)) is not None:
                if stopping():
                    raise Interrupted(f"stopped while {sign.holder} was at work on {path}")
                if not said and time.monotonic() - began >= PATIENCE:
                    logger.warning("%s is at work on %s; it is waited for", sign.holder, path)
                    said = True
                time.sleep(POLL)
            stack.callback(_release, path)
        yield


@contextmanager
def claimed_at_once(paths: Iterable[Path]) -> Iterator[None]:
    """While inside, nobody else makes any of these artifacts.

    Raises:
        Busy: somebody else is at work on one of them.
        OSError: a lease cannot be written.
    """
    with ExitStack() as stack:
        for path in sorted(set(paths)):
            if (sign := _claim(path)) is not None:
                raise Busy(sign.holder)
            stack.callback(_release, path)
        yield


def lease_path(path: Path) -> Path:
    """Where the lease of an artifact is."""
    return path.with_name(f"{path.name}{SUFFIX}")


def holder(path: Path) -> Sign | None:
    """Who is at work on an artifact, as far as its lease tells; None where nobody is, or nobody that lives."""
    lease = lease_path(path)
    if (sign := _look(lease)) is None:
        return None
    return sign if _lives(lease, sign) else None


def clear(path: Path) -> None:
    """Deletes the lease of an artifact whose holder is known to have ended, as one that was killed leaves it."""
    lease = lease_path(path)
    if (sign := _look(lease)) is not None and sign.gone:
        _take_away(lease, sign)


def _claim(path: Path) -> Sign | None:
    """Takes the lease of an artifact, also from a holder that is gone; else what the lease looks like."""
    lease, thread = lease_path(path), threading.get_ident()
    with _guard:
        own = _held.get(path)
        if own is not None and own.thread == thread:
            own.count += 1
            return None
    if (sign := _look(lease)) is not None:
        if _lives(lease, sign):
            return sign
        _take_away(lease, sign)
    token = secrets.token_hex(8)
    if not _create(lease, token):
        return _look(lease) or _claim(path)
    _signs.pop(lease, None)
    with _guard:
        _held[path] = _Held(token, thread)
    _beat()
    return None


def _lives(lease: Path, sign: Sign) -> bool:
    """Whether the holder of a lease is not known to have ended, and the lease has changed in the last minute."""
    before, since = _signs.get(lease, (None, 0.0))
    if sign != before:
        _signs[lease] = sign, (since := time.monotonic())
    return not sign.gone and time.monotonic() - since < STALE


def _release(path: Path) -> None:
    with _guard:
        own = _held[path]
        own.count -= 1
        if own.count:
            return
        del _held[path]
    lease = lease_path(path)
    if (sign := _look(lease)) is not None and sign.token == own.token:
        lease.unlink(missing_ok=True)


def _create(lease: Path, token: str) -> bool:
    """Whether the lease is ours now: no other file of its name was there."""
    lease.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = lease.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(_text(token, time.time()))
    except OSError:
        lease.unlink(missing_ok=True)
        raise
    return True


def _text(token: str, since: float) -> str:
    own = {"token": token, "place": place(), "pid": os.getpid(), "host": platform.node()}
    return json.dumps({**own, "since": since, "doing": doing()}) + "\n"


def _look(lease: Path) -> Sign | None:
    """What a lease looks like at present; None where there is none."""
    try:
        with lease.open(encoding="utf-8", errors="replace") as file:  # opened, for what a network disk knows of it
            changed, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
        token, where, pid, host = str(values["token"]), str(values["place"]), int(values["pid"]), str(values["host"])
        since, words = float(values["since"]), str(values["doing"])
    except (ValueError, KeyError, TypeError):  # its holder is writing it, or ended in between
        return Sign("", changed, "somebody", gone=False)
    return Sign(token, changed, f"process {pid} on {host}", ended(where, pid), since, words)


def _take_away(lease: Path, sign: Sign) -> None:
    """Removes a stale lease; if it turns out to be a new one, which was made meanwhile, it is put back."""
    away = lease.with_name(f"{lease.name}.{secrets.token_hex(4)}")
    try:
        lease.rename(away)
    except FileNotFoundError:
        return
    found = _look(away)
    if found is not None and found.token != sign.token:
        with suppress(OSError):
            os.link(away, lease)
    away.unlink(missing_ok=True)


def _beat() -> None:
    """Starts the thread that shows signs of life of all leases of this process, where there is none yet."""
    global _beating
    with _guard:
        if _beating is None or not _beating.is_alive():
            _beating = threading.Thread(target=_show_life, name="leases", daemon=True)
            _beating.start()


def _show_life() -> None:
    while True:
        time.sleep(BEAT)
        with _guard:
            own = {path: held.token for path, held in _held.items()}
        for path, token in own.items():
            lease = lease_path(path)
            with suppress(OSError):  # a disk that fails for a moment; the lease is good for longer than a beat
                sign = _look(lease)
                if sign is not None and sign.token == token:
                    with lease.open("r+", encoding="utf-8") as file:
                        file.write(_text(token, sign.since))
                        file.truncate()

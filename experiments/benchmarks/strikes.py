"""Faults that strike a sweep at work."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from grounds import Command, Ground
from PIL import Image

from vlprune.store.lease import SUFFIX as LEASE
from vlprune.store.record import ERROR, LOG, LOSSES

UNCHECKED = (LOG, ERROR, LOSSES)  # ends of names of files for people


class Missed(Exception):
    """There was nothing to strike at that moment."""


def sweep_killed(_: Ground, command: Command) -> None:
    """SIGKILL to the sweep's own process."""
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
    files = [path for path in ground.files() if not path.name.endswith((*UNCHECKED, LEASE))]
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

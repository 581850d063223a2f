"""Cost: the wall-clock seconds and the peak memory of named steps of work."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Cost:
    """What a step of work took.

    Attributes:
        seconds: wall-clock time.
        peak_memory: bytes; on a GPU of its allocations, else of the resident process.
    """

    seconds: float = 0.0
    peak_memory: int = 0


@contextmanager
def measured() -> Iterator[Cost]:
    """The cost of the block, filled in when it ends.

    Example:
        >>> with measured() as cost:
        ...     prune()
        >>> cost.seconds
    """
    cost = Cost()
    _reset_peak()
    start = time.perf_counter()
    yield cost
    cost.seconds = round(time.perf_counter() - start, 3)
    cost.peak_memory = _peak()


def _reset_peak() -> None:
    """Starts a new measurement where the system can; elsewhere the peak is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""Origin: when, where and with what an artifact was made."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Packages that can change the numbers of a run.
PACKAGES = (
    "vlprune",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "open_clip_torch",
    "accelerate",
    "datasets",
    "numpy",
    "pillow",
)
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Origin:
    """When, where and with what an artifact was made.

    Attributes:
        started: when its making began, as "2026-11-27T21:30:05+00:00".
        finished: when it ended.
        host: name of the machine.
        device: name of the processor or of the CUDA device that models ran on; "2 × " and the name where two did.
        commit: the commit of vlprune's source, with "-dirty" where files differ from it; "" where it is in no clone.
        versions: {package: version, or "not installed"}.
    """

    started: str
    finished: str
    host: str
    device: str
    commit: str
    versions: dict[str, str]


def now() -> str:
    """The time, to the second, in UTC: "2026-11-27T21:30:05+00:00"."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def origin(started: str, device: str, devices: int = 1) -> dict[str, Any]:
    """The origin, as plain values, of what this process has made by now.

    Args:
        started: what `now` returned at the beginning.
        device: name of the CUDA device that models ran on; "" for the processor.
        devices: how many such devices, or processes, made it together.
    """
    named = f"{devices} × " * (devices > 1) + (device or processor())
    return asdict(Origin(started, now(), platform.node(), named, commit(), versions()))


@cache
def versions() -> dict[str, str]:
    """{package: version, or "not installed"} of PACKAGES."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from the source tree
            found[package] = "not installed"
    return found


@cache
def commit() -> str:
    """The commit of vlprune's source, with "-dirty" where files differ from it; "" where git does not know it."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # an installed package may lie in a clone of something else
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


@cache
def processor() -> str:
    """The name of the processor, as "Intel(R) Xeon(R) Processor @ 2.10GHz", or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in found.items()}
    name = names.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the name: family, model and stepping tell processors apart that are all called the same.
    numbers = [names[key] for key in ("cpu family", "model", "stepping") if key in names]
    return f"{name} ({'/'.join(numbers)})" if numbers else name

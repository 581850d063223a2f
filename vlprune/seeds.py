"""The seeds of a run's random choices: a stream of its own for each purpose."""

from __future__ import annotations

import hashlib

# Raised when the seeds that come out change, so that what was drawn with them is made again.
VERSION = 1


def seed_of(seed: int, *purpose: str | int) -> int:
    """The seed, in [0, 2**63), of one purpose of a run: of its digest, so that neighbouring seeds share no stream.

    Args:
        seed: that of the run.
        purpose: what is drawn, such as "order of examples", and where it is drawn often the number of the time, such as
            "search step", 3.
    """
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:8], "big") >> 1

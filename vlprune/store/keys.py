"""Keys: digests of everything that a result depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vlprune.config import to_plain


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as canonical JSON; configs count as their plain values.

    Raises:
        TypeError: a part that is no plain value.
    """
    text = json.dumps(parts, default=_plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if (plain := to_plain(value)) is value:
        raise TypeError(f"{value!r} is no plain value, which a key is made of")
    return plain

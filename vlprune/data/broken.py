"""Images that cannot be read, found by decoding every image of a split once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import PIL

from vlprune.data.decode import UnreadableImage, max_pixels, open_image
from vlprune.data.fingerprint import Fingerprint
from vlprune.data.layouts import READERS_VERSION, Examples, Kind
from vlprune.data.source import Directory, Hub, cache_home
from vlprune.store.atomic import write_text

CHUNK = 256  # images that are decoded at a time


def find_broken(examples: Examples, limit: int | None) -> dict[int, str]:
    """{row: annotation and reason} of the images that cannot be read, before the `limit`-th one that can.

    Every file is decoded once, however many rows show it; rows beyond the limit are not.

    Raises:
        OSError: an image that cannot be read for a reason that is not its own (see `open_image`).
    """
    broken: dict[int, str] = {}
    state: dict[str | int, str] = {}
    size = len(examples.data)
    images = examples.data.select_columns("image")
    with ThreadPoolExecutor() as pool:
        for start in range(0, size, CHUNK):
            chunk = [row for row in range(start, min(start + CHUNK, size)) if row not in examples.problems]
            pictures = {row: images[row]["image"] for row in chunk}
            keys = {row: picture["path"] if picture.get("bytes") is None else row for row, picture in pictures.items()}
            new = {keys[row]: pictures[row] for row in chunk if keys[row] not in state}
            state.update(zip(new, pool.map(_fault, new.values())))
            for row in range(start, min(start + CHUNK, size)):
                if row - len(broken) == limit:
                    return broken
                fault = examples.problems.get(row) or state[keys[row]]
                if fault:
                    broken[row] = f"{pictures[row]['where']}{fault}" if row in pictures else fault
    return broken


def _fault(picture: dict[str, str]) -> str:
    """Why an image cannot be read, empty if it can."""
    try:
        open_image(picture).close()
    except UnreadableImage as error:
        return str(error).removeprefix(picture["where"])
    return ""


def left_out(
    source: Directory | Hub, known: Fingerprint, kind: Kind, split: str, limit: int | None, read: Callable[[], Examples]
) -> dict[int, str]:
    """`find_broken` of a split, with paths below the directory; kept in `left_out/` of $VLPRUNE_CACHE.

    Args:
        source: the data.
        known: its fingerprint.
        kind: whether pairs or questions are read.
        split: one split or several.
        limit: number of rows to keep; None: all.
        read: returns the examples.
    """
    wanted = repr((known.contents, known.listing, kind, split, limit, READERS_VERSION, PIL.__version__, max_pixels()))
    kept = cache_home() / "left_out" / f"{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.json"
    try:
        return {int(row): str(line) for row, line in json.loads(kept.read_text())["left_out"]}
    except (OSError, ValueError, KeyError, TypeError):  # not kept yet, or by something else
        pass
    found = {row: below(line, source) for row, line in find_broken(read(), limit).items()}
    if known.settled:
        with suppress(OSError):  # without the cache it is only slower
            write_text(kept, json.dumps({"left_out": list(found.items())}))
    return found


def below(line: str, source: Directory | Hub) -> str:
    """A line about an image without the place of the data, so that it is the same wherever the data lies."""
    line = line.removeprefix(f"{source.name}, ")
    if isinstance(source, Hub) or source.root == Path():
        return line
    for root in (source.root, source.root.resolve()):
        line = re.sub(rf"(?<![\w./-]){re.escape(f'{root}{os.sep}')}", "", line)
    return line

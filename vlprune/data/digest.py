"""Short hashes of data sets, which keys of cached results depend on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from vlprune.data import scenes, tables
from vlprune.data.images import SUFFIXES
from vlprune.data.source import DATASETS, TABLES, Directory, Hub, cache_home, find_source
from vlprune.store.atomic import write_text

EDGE = 4096  # bytes of an image's or a table's start, and of its end, that are read
SETTLED = 2.0  # seconds after which a change of a file is sure to change its time


class _File(NamedTuple):
    name: str
    path: str
    size: int
    changed: int
    whole: bool


def data_digest(name: str) -> str:
    """Short hash of a data set.

    Of a directory: its annotation files, and of each image, table and shard the name, the size and the first and last
    4 KiB. A change in the middle of a large image that keeps its size goes unseen: reading all of COCO would take
    minutes every time. While names, sizes and times of change of all files stay, the hash is that of last time, kept in
    `digests/` of $VLPRUNE_CACHE. A hub data set is known by its revision, an embedded one by its version.
    """
    if name in DATASETS:
        return f"{name}-{scenes.VERSION}"
    source = find_source(name)
    if isinstance(source, Hub):
        return tables.digest(source)
    files = list(_files(source))
    listing = hashlib.sha256(repr([(f.name, f.size, f.changed) for f in files]).encode()).hexdigest()
    place = hashlib.sha256(f"{source.root.resolve()}\n{[str(path) for path in source.files]}".encode()).hexdigest()
    kept = cache_home() / "digests" / f"{place[:16]}.json"
    try:
        before = json.loads(kept.read_text())
        if before["listing"] == listing:
            return before["digest"]
    except (OSError, ValueError, KeyError, TypeError):  # not kept yet, or by something else
        pass
    found = _hash(files)
    # A file that changes again within the resolution of its time would look as it did.
    if all(file.changed < (time.time() - SETTLED) * 1e9 for file in files):
        with suppress(OSError):  # without the cache it is only slower
            write_text(kept, json.dumps({"listing": listing, "digest": found, "data": str(source.root.resolve())}))
    return found


def _files(source: Directory) -> Iterator[_File]:
    """The files that count: annotations, then what is in `images/`, then images and tables elsewhere below the root."""
    root, images = str(source.root), str(source.root / "images")
    annotations = [str(path) for path in source.files if path.suffix not in TABLES]
    tabular = {str(path) for path in source.tables()}
    inside = _walk(images)
    outside = [
        path
        for path in _walk(root)
        if not path.startswith(images + os.sep) and (path in tabular or os.path.splitext(path)[1].lower() in SUFFIXES)
    ]
    for whole, paths in ((True, annotations), (False, inside), (False, outside)):
        for path in paths:
            try:
                known = os.stat(path)
            except FileNotFoundError:  # a link to nothing
                continue
            yield _File(path[len(root) :].lstrip(os.sep), path, known.st_size, known.st_mtime_ns, whole)


def _walk(top: str) -> list[str]:
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names)


def _hash(files: list[_File]) -> str:
    sha = hashlib.sha256()
    for each in files:
        with open(each.path, "rb") as file:
            if each.whole:
                sha.update(file.read())
            else:
                sha.update(f"{each.name} {each.size}\n".encode())
                sha.update(file.read(EDGE))
                file.seek(max(EDGE, each.size - EDGE))
                sha.update(file.read(EDGE))
    return sha.hexdigest()[:16]

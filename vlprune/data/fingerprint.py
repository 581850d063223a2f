"""Fingerprints of data sets: short hashes of their contents, on which the keys of results depend."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal, NamedTuple

from vlprune.data import karpathy, lists, tables
from vlprune.data.images import SUFFIXES, list_files, stat_file
from vlprune.data.source import EMBEDDED, TABLES, Directory, Hub, cache_home, find_source
from vlprune.store.atomic import write_text
from vlprune.store.identity import SETTLED

EDGE = 4096  # bytes of an image's or a table's start, and of its end, that are read
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # where `datasets` finds the splits of a directory


class Fingerprint(NamedTuple):
    """What is known of the present contents of a data set.

    Attributes:
        contents: short hash of the contents.
        listing: hash of the names, sizes, times and inodes of all files. It changes with every change of a file, and
            with copies, too.
        settled: whether the listing is sure to change with the next change of a file.
        paths: the files, and all folders below the directory.
    """

    contents: str
    listing: str
    settled: bool
    paths: tuple[str, ...] = ()


class _File(NamedTuple):
    """A file, or a link to a folder, whose contents count.

    Attributes:
        name: path below the directory.
        path: path to open.
        part: what is read of it.
        size: bytes.
        modified: time of the last change of its contents, in nanoseconds.
        changed: time of the last change of anything, which no program can set back.
        inode: number of the file on its disk.
    """

    name: str
    path: str
    part: Literal["whole", "edges", "target"]
    size: int
    modified: int
    changed: int
    inode: int


def data_fingerprint(name: str) -> str:
    """Short hash of the contents of a data set, wherever it lies.

    Of a directory: the names and contents of the annotation files, and of each image, table and shard the name, the
    size and the first and last 4 KiB. A change in the middle of a large image that keeps its size goes unseen: reading
    all of COCO would take minutes every time. Data given by the names of some annotation files counts with what their
    readers find beside them, `answer_list.json` and `regions.json`. While name, size, times and inode of every file
    stay, the hash is that of last time, kept in `fingerprints/` of $VLPRUNE_CACHE. A hub data set is known by its
    revision, an embedded one by its version.

    Raises:
        ValueError: an unknown name.
        OSError: a file or folder that cannot be read.
    """
    return take_fingerprint(find_source(name)).contents


def take_fingerprint(source: Directory | Hub) -> Fingerprint:
    """The fingerprint of a source."""
    if (own := EMBEDDED.get(source.name)) is not None:
        return Fingerprint(f"{own.name}-{own.version}", "", settled=True)
    if isinstance(source, Hub):
        return Fingerprint(tables.fingerprint(source), "", settled=True)
    files = list(_files(source))
    listing = hashlib.sha256(repr(files).encode()).hexdigest()
    given = [os.path.relpath(path, source.root) for path in source.files]
    place = hashlib.sha256(f"{source.root.resolve()}\n{source.whole} {given}".encode())
    kept = cache_home() / "fingerprints" / f"{place.hexdigest()[:16]}.json"
    folders = [folder for folder, _, _ in os.walk(source.root)] if source.whole else [str(source.root)]
    paths = (*(file.path for file in files), *folders)
    settled = all(max(file.modified, file.changed) < (time.time() - SETTLED) * 1e9 for file in files)
    try:
        before = json.loads(kept.read_text())
        if before["listing"] == listing:
            return Fingerprint(before["contents"], listing, settled, paths)
    except (OSError, ValueError, KeyError, TypeError):  # not kept yet, or by something else
        pass
    contents = _hash(files, source)
    if settled:
        with suppress(OSError):  # without the cache it is only slower
            data = str(source.root.resolve())
            write_text(kept, json.dumps({"listing": listing, "contents": contents, "data": data}))
    return Fingerprint(contents, listing, settled, paths)


def _files(source: Directory) -> Iterator[_File]:
    """The files that count: annotations, then what is in `images/`, then images and tables elsewhere below the root."""
    root, images = str(source.root), str(source.root / "images")
    annotations = [str(path) for path in _annotations(source)]
    given = {str(path) for path in source.tables()}
    own = TABLES if source.whole and given else ()

    def counts(path: str) -> bool:
        suffix = os.path.splitext(path)[1].lower()
        return suffix in SUFFIXES or suffix in own or path in given or (os.path.islink(path) and os.path.isdir(path))

    below = list_files(root)
    inside = [path for path in below if path.startswith(images + os.sep)]
    outside = [path for path in below if not path.startswith(images + os.sep) and path != images and counts(path)]
    yield from _known(root, "whole", annotations)
    yield from _known(root, "edges", list_files(images) if os.path.islink(images) else inside)
    yield from _known(root, "edges", outside)


def _annotations(source: Directory) -> Iterable[Path]:
    """The files that are read whole: those given, those that readers find beside them, the cards of `datasets`."""
    beside = [*lists.answer_files(source.root), source.root / karpathy.REGIONS]
    if source.whole and source.tables():
        beside += [source.root / name for name in CARDS]
    given = [path for path in source.files if path.suffix not in TABLES]
    return dict.fromkeys([*given, *(path for path in beside if path.is_file())])


def _known(root: str, part: Literal["whole", "edges"], paths: Iterable[str]) -> Iterator[_File]:
    for path in paths:
        known = stat_file(path)
        is_folder = known is not None and S_ISDIR(known.st_mode)
        # A link to nothing, or what is never read, such as a FIFO.
        if known is None or not (is_folder or S_ISREG(known.st_mode)):
            continue
        if is_folder:  # its files count where they are, and what changes in it does not change the link
            known = os.lstat(path)
        size, times = 0 if is_folder else known.st_size, (known.st_mtime_ns, known.st_ctime_ns)
        yield _File(os.path.relpath(path, root), path, "target" if is_folder else part, size, *times, known.st_ino)


def _hash(files: Iterable[_File], source: Directory) -> str:
    sha = hashlib.sha256(f"{source.whole and bool(source.tables())}\n".encode())
    for each in files:
        sha.update(f"{each.name} {each.part} {each.size}\n".encode())
        if each.part == "target":
            target = os.path.relpath(os.path.realpath(each.path), os.path.realpath(source.root))
            sha.update(f"{target}\n".encode())
            continue
        with open(each.path, "rb") as file:
            if each.part == "whole":
                sha.update(file.read())
            else:
                sha.update(file.read(EDGE))
                file.seek(max(EDGE, each.size - EDGE))
                sha.update(file.read(EDGE))
    return sha.hexdigest()[:16]

"""Fingerprints of a model's files: short hashes of their contents, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vlprune.store.identity import Identity, identity


class Fingerprint(NamedTuple):
    """What is known of the present files of a model.

    Attributes:
        contents: short hash of their contents.
        listing: sizes, times and inodes of the files, which change with every change of a file, and with copies, too.
        paths: the files, and the folders that hold them.
    """

    contents: str
    listing: str
    paths: tuple[str, ...]


def fingerprint(files: Mapping[str, Path], *texts: str) -> Fingerprint:
    """The fingerprint of files and texts; its contents are 16 hexadecimal digits of their SHA-256.

    Args:
        files: {role of the file, such as "config.json" or "weights": its path}; the path does not count.
        texts: further contents, such as settings as JSON.
    """
    sha, listing = hashlib.sha256(), []
    for role, path in sorted(files.items()):
        looks = identity(path)
        listing.append(looks)
        # Computed once in a process while the file stays as it is.
        sha.update(f"{role}\n{_hash(path, looks)}\n".encode())
    for text in texts:
        sha.update(text.encode())
    paths = {str(path) for file in files.values() for path in (file, file.parent)}
    return Fingerprint(sha.hexdigest()[:16], repr(listing), tuple(sorted(paths)))


@lru_cache(maxsize=1024)
def _hash(path: Path, _identity: Identity) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

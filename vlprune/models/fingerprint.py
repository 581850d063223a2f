"""Fingerprints of a model's files: short hashes of their contents, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path


def fingerprint(files: Mapping[str, Path], *texts: str) -> str:
    """16 hexadecimal digits of the SHA-256 of files and texts.

    Args:
        files: {role of the file, such as "config.json" or "weights": its path}; the path does not count.
        texts: further contents, such as settings as JSON.
    """
    sha = hashlib.sha256()
    for role, path in sorted(files.items()):
        sha.update(f"{role}\n{_hash_of(path)}\n".encode())
    for text in texts:
        sha.update(text.encode())
    return sha.hexdigest()[:16]


def _hash_of(path: Path) -> str:
    """SHA-256 of a file, computed once in a process while the file stays as it is."""
    found = path.stat()
    return _hash(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1024)
def _hash(path: Path, *_identity: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

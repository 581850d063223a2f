"""Pictures that were opened, kept within a limit of memory: training and evaluation ask for the same ones often."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from PIL.Image import Image

from vlprune.data.decode import open_image
from vlprune.store.identity import identity

LIMIT = 256 << 20  # bytes of pixels that a process keeps


class Kept:
    """Pictures by what tells them from all others, those that were asked for last.

    Args:
        limit: bytes of pixels that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._pictures: OrderedDict[Hashable, Image] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Image]) -> Image:
        """The picture of a key: the kept one, or what `make` returns. Nobody may change it."""
        with self._guard:
            picture = self._pictures.get(key)
        if picture is None:
            picture = make()  # several threads at a time
        with self._guard:
            if key not in self._pictures:
                self._size += _bytes(picture)
            self._pictures[key] = picture
            self._pictures.move_to_end(key)
            while self._size > self._limit:
                _, oldest = self._pictures.popitem(last=False)
                self._size -= _bytes(oldest)
        return picture


_KEPT = Kept(LIMIT)


def opened_images(rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    """The batch transform of the data sets: files to pictures; errors are those of `open_image`.

    A file that changes is opened anew: it counts by its path, size and times.
    """
    if "image" not in rows:
        return rows
    return {**rows, "image": [_opened(image) for image in rows["image"]]}


def _opened(image: Mapping[str, Any]) -> Image:
    try:
        key = _identity(image)
    except (OSError, TypeError, ValueError):
        return open_image(image)  # which says what is wrong
    return _KEPT.get(key, partial(open_image, image))


def _identity(image: Mapping[str, Any]) -> Hashable:
    """What tells an image from all others: of bytes their digest, of a file where it is and what it looks like."""
    if image.get("bytes") is not None:
        return hashlib.sha256(image["bytes"]).digest()
    return image["path"], identity(image["path"])


def _bytes(picture: Image) -> int:
    return 3 * picture.width * picture.height

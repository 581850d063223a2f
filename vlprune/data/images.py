"""Images of a data set: where they lie, and the files that they are."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, NamedTuple, NoReturn

from vlprune import escapes
from vlprune.data.annotations import shown

log = logging.getLogger(__name__)
# {format that is read, as Pillow calls it: suffixes of its files}. No other is tried, whatever a file is called: some
# of Pillow's readers start programs, as that of EPS does, or are hardly ever used.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpeg", ".jpg"),
    "PNG": (".png",),
    "PPM": (".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class Picture(NamedTuple):
    """An image that an annotation names.

    Attributes:
        path: path of the file.
        where: annotation file and entry that name it.
        problem: why there is no such file, empty if there is.
    """

    path: str
    where: str
    problem: str = ""


class ImageFolder:
    """The images of a directory, in its `images/` or directly in it; every folder is listed once.

    The directory and `images/` may be links themselves. What is below them may not lead outside.
    """

    def __init__(self, root: Path):
        self.root = root
        self.tops = [folder for folder in (root / "images", root) if folder.is_dir()]
        self._real = [os.path.realpath(top) for top in self.tops]
        self._inside: set[str] = set()
        self._listed: dict[str, dict[str, bool]] = {}
        self._found: dict[str, Picture] = {}
        self._names: dict[str, str] = {}
        self._numbers: dict[Path, dict[int, list[str]]] = {}
        self._outside: list[str] = []

    def find(self, name: str, where: str, subfolder: str = "") -> Picture:
        """The file of an image that an annotation names by a relative path.

        Folders at the start of the path may be missing on disk, all up to the first that is there, and the file may lie
        in a subfolder that its name lacks, as COCO's do in `train2014/`.

        Raises:
            ValueError: a path that leaves the directory, or a file that another name stands for already.
        """
        if name not in self._found:
            self._found[name] = self._look(name, where, subfolder)
        return self._found[name]._replace(where=where)

    def numbered(self, number: int, where: str, subfolder: str = "") -> Picture:
        """The image whose file name ends with a number; of several, the one in a path that names the subfolder.

        Raises:
            ValueError: several images.
        """
        found = next((paths for top in self.tops if (paths := self._numbered(top).get(number))), [])
        if len(found) > 1 and subfolder:
            found = [path for path in found if subfolder in path] or found
        if not found:
            links = f"; links that leave it are not followed: {', '.join(self._outside)}" if self._outside else ""
            return Picture("", where, f"no image has a name that ends with {number}{links}")
        if len(found) > 1:
            raise ValueError(f"{where}: two images have names that end with {number}: {found[0]}, {found[1]}")
        if found[0] not in self._inside:
            self.stay(found[0], found[0], where)
            self._inside.add(found[0])
        return Picture(found[0], where)

    def _look(self, name: str, where: str, subfolder: str) -> Picture:
        parts = Path(name).parts
        if not parts or os.path.isabs(name) or ".." in parts or "\0" in name:
            raise ValueError(
                f"{where}: image path {shown(name)} leaves {self.tops[0] if self.tops else 'its directory'}"
            )
        extras = dict.fromkeys(((), (subfolder,) if subfolder else ()))
        for start in range(len(parts)):
            for top, extra in product(map(str, self.tops), extras):
                folder = os.path.join(top, *extra, *parts[start:-1])
                linked = self._files(folder).get(parts[-1])
                if linked is None:
                    continue
                path = os.path.join(folder, parts[-1])
                if linked or folder not in self._inside:
                    self.stay(path if linked else folder, name, where)
                    self._inside.add(folder)
                if linked and not is_file(path):
                    continue
                other = self._names.setdefault(path, name)
                if other != name:
                    raise ValueError(
                        f"{where}: image path {shown(name)} and, before, {shown(other)} stand for one file, {path}"
                    )
                return Picture(path, where)
            if start < len(parts) - 1 and any((top / parts[start]).is_dir() for top in self.tops):
                break  # the file is missing in a folder that is there; one of its name elsewhere is another
        wanted = os.path.join(self.tops[0], name) if self.tops else name
        return Picture(wanted, where, f"there is no image {escapes.terminal(wanted)[:1000]}")

    def stay(self, path: str, name: str, where: str) -> None:
        """Refuses a file or folder, which an annotation names, that lies outside, links followed.

        Raises:
            ValueError: with the annotation.
        """
        real = os.path.realpath(path)
        if not self._within(real):
            raise ValueError(f"{where}: image path {shown(name)} leaves {self.root}, it is {real}")

    def _numbered(self, top: Path) -> dict[int, list[str]]:
        """{number: sorted paths} of the images below a top whose names end with a number."""
        if top not in self._numbers:
            numbers, seen = self._numbers.setdefault(top, {}), set()
            for folder, folders, names in os.walk(top, onerror=_fail, followlinks=True):
                real = os.path.realpath(folder)
                within = self._within(real)
                if not within and folder not in self._outside:
                    self._outside.append(folder)
                if not within or real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                for name in names:
                    stem, suffix = os.path.splitext(name)
                    end = re.search(r"(\d+)$", stem)
                    if end and suffix.lower() in SUFFIXES:
                        numbers.setdefault(int(end[1]), []).append(os.path.join(folder, name))
            for paths in numbers.values():
                paths.sort()
        return self._numbers[top]

    def _within(self, real: str) -> bool:
        return any(real == top or real.startswith(top + os.sep) for top in self._real)

    def _files(self, folder: str) -> dict[str, bool]:
        """{name: whether it is a link} of the files in a folder, none if there is no such folder."""
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = {e.name: e.is_symlink() for e in entries if not e.is_dir()}
            except (FileNotFoundError, NotADirectoryError):
                self._listed[folder] = {}
        return self._listed[folder]


def stat_file(path: str) -> os.stat_result | None:
    """What the file system knows of a path, links followed; None if there is nothing.

    Raises:
        OSError: the file system does not tell.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise


def is_file(path: str) -> bool:
    """Whether there is a file, as `os.path.isfile`, which also says no where a disk fails.

    Raises:
        OSError: the file system does not tell.
    """
    known = stat_file(path)
    return known is not None and S_ISREG(known.st_mode)


def open_regular(path: str) -> BinaryIO:
    """A regular file, open for reading; what else may lie at a path, such as a FIFO, is not waited for.

    Raises:
        ValueError: it is no regular file.
        OSError: there is none, or it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return os.fdopen(descriptor, "rb")


def list_files(top: str) -> list[str]:
    """The sorted paths of all files below a folder, and of the links to folders, which are not entered.

    Raises:
        OSError: a folder that cannot be listed.
    """
    found = []
    for folder, folders, names in os.walk(top, onerror=_fail) if os.path.isdir(top) else ():
        paths = (os.path.join(folder, name) for name in folders)
        found += [os.path.join(folder, name) for name in names] + [path for path in paths if os.path.islink(path)]
    return sorted(found)


def _fail(error: OSError) -> NoReturn:
    raise error


def warn_of(broken: Sequence[str], name: str) -> None:
    """Warns, once in a process, of the images of a data set that were left out: their number and the first three."""
    more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
    _warn(f"{name}: left out {len(broken)} images that cannot be read: {'; '.join(broken[:3])}{more}")


@cache
def _warn(message: str) -> None:
    log.warning(message)

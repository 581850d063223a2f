"""What the name of a data set stands for: a directory, some files of one, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from glob import escape, has_magic
from pathlib import Path

from filelock import FileLock

from vlprune.config import unknown
from vlprune.data import drawn
from vlprune.data.landscapes import LANDSCAPES
from vlprune.data.scenes import SCENES

EMBEDDED = {own.name: own for own in (SCENES, LANDSCAPES)}
DATASETS = tuple(EMBEDDED)
TABLES = (".arrow", ".csv", ".jsonl", ".parquet", ".tar")  # besides annotation lists, what load_dataset reads
HUB = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Directory:
    """Files on disk.

    Attributes:
        name: name of the data, as the user wrote it.
        root: the directory that holds the images, in `images/` or directly.
        files: the annotation files and tables to choose from, sorted.
        whole: whether the name is the directory's own, not that of some of its files.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    whole: bool

    def named(self, pattern: str) -> list[Path]:
        """The files whose names match a pattern."""
        return [path for path in self.files if path.match(pattern)]

    def tables(self) -> list[Path]:
        """The files that `datasets` reads."""
        return [path for path in self.files if path.suffix in TABLES]


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub: `owner/name`, possibly with `:config`.

    Attributes:
        name: name of the data, as the user wrote it.
        path: its id, `owner/name`.
        config: name of its configuration; None: the only one, or the default.
    """

    name: str
    path: str
    config: str | None


def find_source(name: str) -> Directory | Hub:
    """The source of a name.

    A name is an embedded data set, a directory, annotation files or tables of one directory (one path or a pattern such
    as `lists/coco_karpathy_*.json`, where a directory holds several data sets), or a hub id `owner/name[:config]`. JSON
    files are looked for in the directory and in its `annotations/`; a pattern inside `annotations/` belongs to the
    directory above.

    Raises:
        ValueError: a name that is none of these.
    """
    if name in EMBEDDED:
        return _directory(name, _drawn_root(EMBEDDED[name]))
    path = Path(name)
    if path.is_dir():
        return _directory(name, path)
    found = sorted(path.parent.glob(path.name if has_magic(path.name) else escape(path.name))) if path.name else []
    files = tuple(file for file in found if file.is_file())
    if files:
        root = path.parent
        return Directory(name, root.parent if root.name == "annotations" else root, files, whole=False)
    if hub := HUB.fullmatch(name):
        return Hub(name, hub["path"], hub["config"])
    raise ValueError(f"{unknown('data set', name, DATASETS)}; and there is no such directory or file")


def cache_home() -> Path:
    """The directory of generated data and of what is known of data: $VLPRUNE_CACHE, else ~/.cache/vlprune."""
    return Path(os.environ.get("VLPRUNE_CACHE", Path.home() / ".cache" / "vlprune"))


def _directory(name: str, root: Path) -> Directory:
    jsons = [path for folder in (root, root / "annotations") for path in sorted(folder.glob("*.json"))]
    # Listed by hand: a pattern for each suffix would go through a folder of images five times.
    names = [(folder, name) for folder in (root, *_folders(root)) for name in os.listdir(folder)]
    found = [folder / name for folder, name in names if os.path.splitext(name)[1] in TABLES]
    tables = sorted(found, key=lambda path: (path.parent != root, TABLES.index(path.suffix), path))
    return Directory(name, root, tuple(path for path in (*jsons, *tables) if path.is_file()), whole=True)


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return [root / entry.name for entry in entries if entry.is_dir()]


def _drawn_root(own: drawn.DrawnSet) -> Path:
    """The directory of an embedded data set, which is drawn when it is first used."""
    root = cache_home() / f"{own.name}-{own.version}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{root}.lock"):
            if not root.is_dir():
                for left in root.parent.glob(f"{root.name}.part-*"):  # by a process that was killed
                    shutil.rmtree(left)
                part = Path(tempfile.mkdtemp(dir=root.parent, prefix=f"{root.name}.part-"))
                try:
                    drawn.write(part, own)
                    os.rename(part, root)
                except BaseException:
                    shutil.rmtree(part, ignore_errors=True)
                    raise
    return root

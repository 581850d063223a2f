"""The layouts of a directory: which reader it gets, and what all readers make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets

from vlprune.data import karpathy, lists, official, tables
from vlprune.data.annotations import check_whole, check_writable, once, shown
from vlprune.data.images import Picture
from vlprune.data.source import Directory, Hub

Kind = Literal["pairs", "questions"]
READERS_VERSION = 2  # to raise when a reader makes other examples, pictures, pairs or batches of the same files
_KEY = {"pairs": "image_id", "questions": "question_id"}
_IMAGE = {"path": Value("string"), "where": Value("string")}
_FEATURES: dict[Kind, dict[str, Any]] = {
    "pairs": {"image": _IMAGE, "image_id": None, "captions": List(Value("string")), "regions": tables.REGIONS},
    "questions": {
        "image": _IMAGE,
        "image_id": None,
        "question": Value("string"),
        "question_id": None,
        "answers": List(Value("string")),
        "answer_type": Value("string"),
        "weight": Value("float64"),
    },
}


@dataclass(frozen=True)
class Layout:
    """A kind of annotation files with its reader.

    Attributes:
        name: name of the layout, for people.
        pattern: names of its files and what they hold, in words.
        find: (directory) -> the files of this layout in it, possibly none.
        read: (directory, files, split) -> the rows of a split.
    """

    name: str
    pattern: str
    find: Callable[[Directory], list[Path]]
    read: Callable[[Directory, Sequence[Path], str], list[dict[str, Any]]]


LAYOUTS: dict[Kind, tuple[Layout, ...]] = {
    "pairs": (
        Layout("Karpathy's splits", "dataset_*.json", karpathy.find, karpathy.read),
        Layout("COCO captions", "captions_*.json", official.find_captions, official.read_captions),
        Layout("ALBEF, BLIP or X-VLM lists", "*.json, lists of {image, caption}", lists.find_pairs, lists.read_pairs),
    ),
    "questions": (
        Layout("VQA v2", "*questions.json, *annotations.json", official.find_questions, official.read_questions),
        Layout(
            "ALBEF, BLIP or X-VLM lists",
            "*.json, lists of {image, question, answer}",
            lists.find_questions,
            lists.read_questions,
        ),
    ),
}


@dataclass(frozen=True)
class Examples:
    """The examples of a split, their images not opened yet.

    Attributes:
        data: the columns of pairs or of questions; an image is {where, path, possibly bytes}.
        problems: {row: annotation, and what is wrong with its image} for images that are not there.
    """

    data: Dataset
    problems: dict[int, str]


def find_layout(directory: Directory, kind: Kind) -> tuple[Layout, list[Path]] | None:
    """The layout of a directory and its files; None for one that `datasets` reads.

    Raises:
        FileNotFoundError: no layout, with what was looked for and what is there.
        ValueError: several layouts, or none because a file is damaged or empty.
    """
    found = [(layout, files) for layout in LAYOUTS[kind] if (files := layout.find(directory))]
    if len(found) > 1:
        listed = "; ".join(f"{layout.name} ({', '.join(path.name for path in files)})" for layout, files in found)
        raise ValueError(f"{directory.name} has {kind} in several layouts: {listed}; name the files of one as the data")
    if found or directory.tables():
        return found[0] if found else None
    check_whole(directory.named("*.json"))
    wanted = "; ".join(f"{layout.name} ({layout.pattern})" for layout in LAYOUTS[kind])
    names = sorted(path.name for path in (directory.root.iterdir() if directory.whole else directory.files))
    there = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"
    suffixes = ", ".join(f"*{suffix}" for suffix in tables.MODULES)
    raise FileNotFoundError(
        f"{directory.name} has no {kind}: looked for {wanted}; what datasets reads ({suffixes}). There is: {there}"
    )


def annotation_files(source: Directory | Hub, kind: Kind) -> list[str]:
    """The names of the annotation files that are read, the paths of tables, or the hub id."""
    if isinstance(source, Hub):
        return [source.path]
    found = find_layout(source, kind)
    return [path.name for path in found[1]] if found else list(map(str, source.tables()))


def read(source: Directory | Hub, kind: Kind, split: str) -> Examples:
    """The examples of a split, or of several one after another as in `train+val+vg`.

    Raises:
        FileNotFoundError: no known layout.
        ValueError: an unknown or repeated split, a malformed annotation, an id in two splits.
    """
    names = [name.strip() for name in split.split("+")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"a split is a name or different names with + between them, got {split!r}")
    parts = [_read_one(source, kind, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    if kind == "questions":
        parts = _counted_on(parts)
    for key in (name for name in ("image_id", "question_id") if name in parts[0].data.column_names):
        if len({part.data.features[key].dtype for part in parts}) > 1:
            with tables.no_bars():
                parts = [Examples(part.data.cast_column(key, Value("string")), part.problems) for part in parts]
    seen: dict[str, int | str] = {}
    files: dict[str, str | None] = {}
    problems, start = {}, 0
    for name, part in zip(names, parts):
        where = f"{source.name}, split {name} of {split}"
        for value in part.data[_KEY[kind]]:
            once(where, _KEY[kind], value, seen)
        # Pairs have told by their ids; tables hold their images, whatever these were called.
        images = part.data.select_columns(["image"]).flatten().with_format(None)
        named = kind == "questions" and "image.bytes" not in images.column_names
        for image_id, path in zip(part.data["image_id"], images["image.path"]) if named else ():
            if files.setdefault(str(image_id), path) != path:
                raise ValueError(f"{where}: image_id {shown(image_id)} is {path}, before {files[str(image_id)]}")
        problems |= {start + row: problem for row, problem in part.problems.items()}
        start += len(part.data)
    return Examples(concatenate_datasets([part.data for part in parts]), problems)


def _counted_on(parts: Sequence[Examples]) -> list[Examples]:
    """Parts whose negative question_ids, which a list without such counts down from -1, go on from those before."""
    counted, least = [], 0
    for part in parts:
        data, ids = part.data, list(part.data["question_id"])
        if isinstance(ids[0], int) and min(ids) < 0:
            ids = [i + least if i < 0 else i for i in ids]
            names = data.column_names
            data = data.remove_columns("question_id").add_column("question_id", ids).select_columns(names)
            least = min(ids)
        counted.append(Examples(data, part.problems))
    return counted


def _read_one(source: Directory | Hub, kind: Kind, split: str) -> Examples:
    layout = None if isinstance(source, Hub) else find_layout(source, kind)
    if layout is None or isinstance(source, Hub):
        return Examples(*(tables.read_pairs if kind == "pairs" else tables.read_questions)(source, split))
    rows = layout[0].read(source, layout[1], split)
    if not rows:
        names = ", ".join(path.name for path in layout[1])
        raise ValueError(f"{source.name}: there are no {kind} of split {split!r} in {names}")
    pictures: list[Picture] = [row["image"] for row in rows]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in _FEATURES[kind]}
    columns["image"] = [{"path": picture.path, "where": picture.where} for picture in pictures]
    ids = {
        name: Value("int64" if isinstance(columns[name][0], int) else "string")
        for name in columns
        if name.endswith("_id")
    }
    features = Features({name: ids.get(name, feature) for name, feature in _FEATURES[kind].items()})
    for name in ids:  # an id may come from the name of a file
        for value, picture in zip(columns[name], pictures):
            check_writable(picture.where, name, value)
    problems = {n: f"{picture.where}: {picture.problem}" for n, picture in enumerate(pictures) if picture.problem}
    # Not Dataset.from_dict, which walks through every value in Python.
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return Examples(Dataset(table), problems)

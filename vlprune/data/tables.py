"""What `datasets.load_dataset` reads: hub ids, image folders with metadata, parquet and other tables, tar shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from vlprune import escapes
from vlprune.data.annotations import answer_type, no_split, shown, split_of
from vlprune.data.images import ImageFolder, is_file
from vlprune.data.source import Directory, Hub
from vlprune.store.documents import DEEPEST, too_deep

T = TypeVar("T")
REGIONS = List({"box": List(Value("float64")), "phrase": Value("string")})
MODULES = {".arrow": "arrow", ".csv": "csv", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}
IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp")
CAPTIONS = ("captions", "caption", "text", "txt", "sentences", "raw", "json")
QUESTION = ("question",)
ANSWERS = ("answers", "answer", "json")
IMAGE_ID = ("image_id", "img_id", "cocoid", "imgid", "__key__", "filename", "file_name")
QUESTION_ID = ("question_id", "questionId")
INNER = ("raw", "caption", "answer")  # keys of the text in an object


def read_pairs(source: Directory | Hub, split: str) -> tuple[Dataset, dict[int, str]]:
    """The pairs of a split, one row for each image_id, and {row: what is wrong with its image}.

    Columns are found by their usual names. Without a column of ids, an image_id is the split and the number of the row.

    Raises:
        ValueError: no such data set, split or column; an image without captions.
    """
    data = _load(source, split)
    image, captions = _column(source, data, IMAGE), _column(source, data, CAPTIONS)
    texts: dict[str, list[Any]] = {"image_id": _ids(source, data, IMAGE_ID, split), "captions": [], "regions": []}
    first: dict[Any, int] = {}
    for row, (image_id, value) in enumerate(zip(texts["image_id"], data[captions])):
        found = texts_of(value, f"{_entry(source, split, row)}, {captions}")
        texts["captions"].append([])
        texts["regions"].append([])
        texts["captions"][first.setdefault(image_id, row)] += found
    rows = list(first.values())
    for row in rows:
        if not texts["captions"][row]:
            raise ValueError(f"{_entry(source, split, row)}: an image without captions in column {captions}")
    images, problems = _images(source, data, image, split)
    features = {"captions": List(Value("string")), "regions": REGIONS}
    return _joined(images, texts, features, rows), {n: problems[row] for n, row in enumerate(rows) if row in problems}


def read_questions(source: Directory | Hub, split: str) -> tuple[Dataset, dict[int, str]]:
    """The questions of a split, and {row: what is wrong with its image}.

    Without columns of ids, an id is the split and the number of the row. A test split needs no answers.

    Raises:
        ValueError: no such data set, split or column; a repeated question_id; a row without question or answers.
    """
    data = _load(source, split)
    image, asked = _column(source, data, IMAGE), _column(source, data, QUESTION)
    is_test = split.startswith("test")
    answers = _named(data.column_names, ANSWERS) if is_test else _column(source, data, ANSWERS)
    texts: dict[str, list[Any]] = {
        "image_id": _ids(source, data, IMAGE_ID, split),
        "question": [],
        "question_id": _ids(source, data, QUESTION_ID, split),
        "answers": [],
        "answer_type": [None] * len(data),
        "weight": [1.0] * len(data),
    }
    if len(set(texts["question_id"])) < len(data):
        raise ValueError(f"{source.name}, {split}: question_ids occur twice")
    given = data[answers] if answers else [None] * len(data)
    if "answer_type" in data.column_names:
        rows = enumerate(data["answer_type"])
        texts["answer_type"] = [answer_type(_entry(source, split, n), {"answer_type": own}) for n, own in rows]
    for row, (question, value) in enumerate(zip(data[asked], given)):
        where = _entry(source, split, row)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: question must be a text that is not empty, got {question!r}")
        found = [] if value is None else texts_of(value, f"{where}, {answers}")
        if not found and not is_test:
            raise ValueError(f"{where}: a question without answers in column {answers}")
        texts["question"].append(question)
        texts["answers"].append(found)
    images, problems = _images(source, data, image, split)
    features = {name: Value("string") for name in ("question", "answer_type")}
    features |= {"answers": List(Value("string")), "weight": Value("float64")}
    return _joined(images, texts, features, list(range(len(data)))), problems


def streams(source: Directory | Hub) -> bool:
    """Whether calibration reads the data as a stream: hub data sets and directories of shards, which may be large."""
    if isinstance(source, Hub):
        return True
    names = source.tables()
    return bool(names) and not any(path.suffix in (".csv", ".jsonl") or path.stem == "metadata" for path in names)


def stream(source: Directory | Hub, split: str) -> tuple[IterableDataset, str, str]:
    """The rows of a split as a stream, with images undecoded, and the names of its image and its caption column."""
    own = _split(source, split)
    data = _asked(source, lambda: load_dataset(split=own, streaming=True, **_arguments(source)))
    names = data.column_names or list(_asked(source, lambda: next(iter(data))))
    image, captions = (_wanted(source, names, wanted) for wanted in (IMAGE, CAPTIONS))
    if isinstance((data.features or {}).get(image), ImageFeature):
        data = data.cast_column(image, ImageFeature(decode=False))
    return data, image, captions


def fingerprint(source: Hub) -> str:
    """The fingerprint of a hub data set: that of its revision on the hub, or in the local cache where that is all."""
    return f"hub-{_asked(source, lambda: load_dataset_builder(source.path, source.config)).hash}"


def texts_of(value: Any, where: str) -> list[str]:
    """The texts of a cell: a text, an object with one, or a list of such.

    Raises:
        ValueError: anything else, or an empty text.
    """
    if isinstance(value, Mapping) and (key := next((key for key in INNER if key in value), None)):
        return texts_of(value[key], where)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [text for each in value for text in texts_of(each, where)]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: wanted texts that are not empty, got {shown(value)}")
    return [value]


def _check_lines(source: Directory) -> None:
    """Refuses JSON lines that are nested so deeply that the library that reads them ends the process."""
    for path in (path for path in source.tables() if path.suffix == ".jsonl"):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.count(b"[") + line.count(b"{") >= DEEPEST and too_deep(line.decode(errors="replace")):
                    raise ValueError(f"{path}, line {number}: lists and objects are nested more than {DEEPEST} deep")


def _arguments(source: Directory | Hub) -> dict[str, Any]:
    """What load_dataset is called with for a source."""
    if isinstance(source, Hub):
        return {"path": source.path, "name": source.config}
    _check_lines(source)
    if source.whole:
        return {"path": str(source.root.resolve())}
    files: dict[str, list[str]] = {}
    for path in source.tables():
        files.setdefault(split_of(path) or "train", []).append(str(path.resolve()))
    suffixes = {path.suffix for path in source.tables()}
    if len(suffixes) > 1:
        raise ValueError(f"{source.name}: wanted files of one kind, found {', '.join(sorted(suffixes))}")
    return {"path": MODULES[suffixes.pop()], "data_files": files}


@contextmanager
def no_bars() -> Iterator[None]:
    """While inside, `datasets` shows no progress bars: a sweep has its own."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def _load(source: Directory | Hub, split: str) -> Dataset:
    """The rows of a split with images undecoded, on disk."""
    own = _split(source, split)
    data = _asked(source, lambda: load_dataset(split=own, **_arguments(source)))
    if not len(data):
        raise ValueError(f"{source.name}: split {split} has no rows")
    for name, feature in data.features.items():
        if isinstance(feature, ImageFeature):
            with no_bars():
                data = data.cast_column(name, ImageFeature(decode=False))
    return data


def _split(source: Directory | Hub, split: str) -> str:
    """The split as the data set names it: val may be called validation."""
    arguments = _arguments(source)
    arguments["config_name"] = arguments.pop("name", None)
    there = _asked(source, lambda: get_dataset_split_names(**arguments))
    names = {"val": ("val", "validation")}.get(split, (split,))
    found = next((name for name in names if name in there), None)
    if found is None:
        raise no_split(source.name, split, there)
    return found


def _asked(source: Directory | Hub, call: Callable[[], T]) -> T:
    """What a call of `datasets` returns; its errors are of one line that names the data."""
    try:
        return call()
    except (ConnectionError, FileNotFoundError) as error:
        if not isinstance(source, Hub):
            _fail(source, "cannot be read by datasets", error)
        _fail(source, "there is no such directory or file, and as a data set of the hub it cannot be had", error)
    except (DatasetsError, NotImplementedError, OSError, ValueError) as error:
        _fail(source, "cannot be read by datasets", error)


def _fail(source: Directory | Hub, what: str, error: Exception) -> NoReturn:
    raise ValueError(f"{source.name}: {what}: {escapes.reason(error.__cause__ or error)}") from None


def _named(there: Iterable[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in there), None)


def _wanted(source: Directory | Hub, there: Sequence[str], wanted: Sequence[str]) -> str:
    found = _named(there, wanted)
    if found is None:
        raise ValueError(f"{source.name}: wanted a column {' or '.join(wanted)}; it has: {', '.join(there)}")
    return found


def _column(source: Directory | Hub, data: Dataset, wanted: Sequence[str]) -> str:
    return _wanted(source, data.column_names, wanted)


def _ids(source: Directory | Hub, data: Dataset, wanted: Sequence[str], split: str) -> list[Any]:
    """The ids of the rows, whole numbers or texts; split and number of the row where not all have an id."""
    name = _named(data.column_names, wanted)
    ids = list(data[name]) if name else [None]
    if None in ids:
        return [f"{split} {row}" for row in range(len(data))]
    if name == "__key__" and len(set(ids)) < len(ids):  # two shards may use the same keys
        return [f"{os.path.basename(url)}/{key}" for url, key in zip(data["__url__"], ids)]
    for row, value in enumerate(ids):  # what was a longer whole number is one of several by now
        if isinstance(value, float) and not abs(value) < 2**53:
            where = _entry(source, split, row)
            raise ValueError(f"{where}: {name} must be a whole number of 64 bits or a text, got {value:g}")
    return ids if all(isinstance(i, int) for i in ids) else list(map(str, ids))


def _entry(source: Directory | Hub, split: str, row: int) -> str:
    return f"{source.name}, {split} row {row}"


def _images(source: Directory | Hub, data: Dataset, name: str, split: str) -> tuple[Dataset, dict[int, str]]:
    """The column {bytes, path, where} of the images, whose bytes stay where they are, and what is wrong with which."""
    column: pa.ChunkedArray = data.data.column(name)
    where = [_entry(source, split, row) for row in range(len(data))]
    kind, problems = column.type, {}
    folder = ImageFolder(source.root) if isinstance(source, Directory) else None
    if folder and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        pictures = [folder.find(path, place) for path, place in zip(column.to_pylist(), where)]
        problems = {row: f"{p.where}: {p.problem}" for row, p in enumerate(pictures) if p.problem}
        rows = [{"bytes": None, "path": picture.path, "where": picture.where} for picture in pictures]
        return Dataset(pa.table({"image": pa.array(rows, _struct(pa.binary()))})), problems
    in_objects = pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
    if not in_objects and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        raise ValueError(f"{source.name}: column {name} must hold images, their bytes or their paths, it holds {kind}")
    chunks, start = [], 0
    for chunk in column.chunks:
        encoded = chunk.field("bytes") if in_objects else chunk
        paths = chunk.field("path").cast(pa.string()) if in_objects else pa.nulls(len(chunk), pa.string())
        places = where[start : start + len(chunk)]
        if folder and encoded.null_count:
            for row, (path, named) in enumerate(zip(paths.to_pylist(), encoded.is_null().to_pylist()), start):
                if named and path:
                    folder.stay(path, path, where[row])
                    if not is_file(path):
                        problems[row] = f"{where[row]}: there is no image {path}"
        parts = [encoded, paths, pa.array(places, pa.string())]
        chunks.append(pa.StructArray.from_arrays(parts, fields=list(_struct(encoded.type))))
        start += len(chunk)
    return Dataset(pa.table({"image": pa.chunked_array(chunks, _struct(chunks[0].field("bytes").type))})), problems


def _struct(encoded: pa.DataType) -> pa.StructType:
    return pa.struct([("bytes", encoded), ("path", pa.string()), ("where", pa.string())])


def _joined(images: Dataset, texts: dict[str, list[Any]], features: Mapping[str, Any], rows: list[int]) -> Dataset:
    """Images and texts side by side, the rows that are asked for."""
    ids = {
        name: Value("int64" if all(isinstance(i, int) for i in values) else "string")
        for name, values in texts.items()
        if name.endswith("_id")
    }
    beside = Dataset.from_dict(texts, features=Features({name: {**ids, **features}[name] for name in texts}))
    joined = concatenate_datasets([images, beside], axis=1)
    return joined if len(rows) == len(joined) else joined.select(rows)

"""Results for pandas: the finished runs of a results directory, here or at a URL, or a file of results."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlprune.config import PARTS
from vlprune.reports.frame import PER_IMAGE, RESULTS, RUN, categories, column, frame, label_of, variant_of
from vlprune.reports.variants import NO_DEFAULTS, Defaults
from vlprune.store.artifacts import content, note_path
from vlprune.store.manifest import manifest_path, read_manifest
from vlprune.store.per_image import SUFFIX, per_image_path
from vlprune.store.record import LOSSES, RECORD, Record, load_records, run_directory
from vlprune.store.remote import ObjectStore

logger = logging.getLogger(__name__)

SOURCE = "results"  # the attribute of a frame that says where it was loaded from
AT_ONCE = 16  # files that are copied at once
IMAGE_COLUMNS = [*RUN, "image_id", "value", "key"]
WHOLE = ("seed", "peak_memory")
NUMBERS = ("sparsity", "value", "dense", "retention", "floor", "measured_sparsity", "seconds")


def load_results(path: str | Path, table: str | None = None) -> pd.DataFrame:
    """One row per finished run and metric, in the order of the tables that were swept.

    Columns: model, method ("dense" for the whole model), variant (the settings of calibration and pruning that differ
    from their defaults, as in "alignment=4 lam=0.1"), sparsity (asked for, in [0, 1)), seed, task, metric, value, dense
    (the value of the dense model under the same settings, NaN where there is none), retention (value / dense), floor
    (the highest value that a model reaches that learned nothing) and each floor by itself, such as "floor.chance";
    every setting that is not the same for all rows, such as "finetuning.lr" and "pruning.options.lam" (missing where
    it is not given, as where the method has none); measured_sparsity, in all and by modality
    ("measured_sparsity.vision"); seconds, of all stages and of each ("seconds.tuned"); peak_memory (bytes); data; host
    and device of the fine-tuning; commit of vlprune, finished (when, UTC) and "versions.torch" and others; settings
    (digest of weights, fine-tuning and task: only rows with equal settings are comparable), key (name of the run's
    directory), label (how a table of these rows calls the method and its variant). Texts are categories, in the order
    of the tables.

    Example:
        >>> df = load_results("results")
        >>> df[df.metric == "r_mean"].pivot_table("value", "label", "sparsity", observed=True)

    Args:
        path: a results directory, such as "results"; a file of rows, as a sweep writes "tables/NAME_results.csv", in
            CSV or Parquet; or a URL of either, such as "s3://BUCKET/PREFIX". A directory without runs, as a fresh clone
            has it, has the rows of the tables in it.
        table: name of the table whose runs are wanted, as in "quickstart", with the names that it has for models and
            variants; None: all runs. Of a file there is no choice.

    Raises:
        FileNotFoundError: there is no such directory, or neither a finished run nor a table in it.
        ConfigError: no sweep of that table.
        ValueError: a file that is not one of results.
    """
    found = _results(path, table)
    found.attrs[SOURCE] = str(path)
    return found


def _results(path: str | Path, table: str | None) -> pd.DataFrame:
    if str(path).endswith(".parquet"):
        return _checked(pd.read_parquet(path), path)
    if str(path).endswith(".csv"):
        return _typed(_rows_of(path))
    with _directory(path, lambda file: file.name == RECORD or file.name.endswith(RESULTS)) as results:
        records, variants, defaults = _found(results, table)
        if records:
            return frame(records, variants, defaults)
        files = sorted((results / "tables").glob(f"{'*' if table is None else table}{RESULTS}"))
        if not files:
            raise FileNotFoundError(_nothing(path, table, "neither a finished run nor a table of results"))
        rows = pd.concat([_rows_of(file) for file in files]).drop_duplicates(["key", "metric"], ignore_index=True)
        found = _typed(rows)
        if len(files) > 1:
            found["label"] = categories(label_of(found.method, found.variant))
        return found


def load_layers(path: str | Path, table: str | None = None) -> pd.DataFrame:
    """One row per finished run and prunable layer: how much of it is zero.

    Columns: model, method, variant, sparsity (asked for), seed, task, layer, modality ("vision", "text" or "fusion"),
    weights (their number), zeros (how many of them are zero), measured_sparsity (zeros / weights), key.

    Args:
        path: a results directory, or the URL of one.
        table: as `load_results` takes it.

    Raises:
        FileNotFoundError: there is no such directory, or no finished run in it.
        ConfigError: no sweep of that table.
    """
    with _directory(path, lambda file: file.name == RECORD) as results:
        records, variants, _ = _found(results, table)
    if not records:
        raise FileNotFoundError(_nothing(path, table, "no finished run"))
    long = _repeated(records, variants, [len(record.layers) for record in records])
    layers = [{"layer": name, **layer} for record in records for name, layer in record.layers.items()]
    found = pd.DataFrame(layers, columns=["layer", "modality", "weights", "zeros"])
    found = found.assign(layer=categories(found.layer), modality=categories(found.modality))
    found["measured_sparsity"] = found.zeros / found.weights
    return pd.concat([long, found, long.pop("key")], axis=1)


def load_losses(path: str | Path, table: str | None = None) -> pd.DataFrame:
    """One row per finished run and step of its fine-tuning.

    Columns: model, method, variant, sparsity (asked for), seed, task, step (from 1), loss, lr (the learning rate of the
    step), key.

    Args:
        path: a results directory, or the URL of one.
        table: as `load_results` takes it.

    Raises:
        FileNotFoundError: there is no such directory, or no finished run in it.
        ConfigError: no sweep of that table.
    """
    with _directory(path, lambda file: file.name in (RECORD, LOSSES)) as results:
        records, variants, _ = _found(results, table)
        files = {record.key: run_directory(results, record.key) / LOSSES for record in records}
        steps = {key: pd.read_csv(file) for key, file in files.items() if file.is_file()}
    if not records:
        raise FileNotFoundError(_nothing(path, table, "no finished run"))
    empty = pd.DataFrame({"step": [], "loss": [], "lr": []})
    own = [steps.get(record.key, empty) for record in records]
    long = _repeated(records, variants, list(map(len, own)))
    found = pd.concat(own, ignore_index=True).astype({"step": int, "loss": float, "lr": float})
    return pd.concat([long, found, long.pop("key")], axis=1)


def load_per_image(path: str | Path, table: str | None = None) -> pd.DataFrame:
    """One row per finished run, metric and image of the test set: the pseudo-value, see `eval.pseudo`.

    Columns: model, method, variant, sparsity (asked for), seed, task, metric, image_id, value (their mean over the
    images is the metric of the run), key.

    Args:
        path: a results directory, or the URL of one. A directory without runs, as a fresh clone has it, has the
            pseudo-values of the tables in it.
        table: as `load_results` takes it.

    Raises:
        FileNotFoundError: there is no such directory, or neither a finished run nor a table in it.
        ConfigError: no sweep of that table.
    """
    runs = load_results(path, table).reindex(columns=[*RUN[:-1], "key"]).drop_duplicates(["key"])
    found = per_image_of(path, runs.key)
    long = [own.rename_axis("image_id").reset_index().melt("image_id", var_name="metric") for own in found.values()]
    rows = pd.concat([own.assign(key=key) for key, own in zip(found, long)] or [pd.DataFrame(columns=IMAGE_COLUMNS)])
    rows = runs.astype({"key": str}).merge(rows, on="key").reindex(columns=IMAGE_COLUMNS)
    return rows.assign(**{name: categories(list(rows[name])) for name in ("metric", "image_id", "key")})


def per_image_of(path: str | Path, keys: Iterable[str]) -> dict[str, pd.DataFrame]:
    """{run key: pseudo-values (images, metrics), the image ids as index} of the runs of which they are known.

    Args:
        path: as `load_results` takes it; those of a file "NAME_results.csv" are in "NAME_images.parquet" beside it.
        keys: keys of runs.
    """
    asked = list(dict.fromkeys(keys))  # in their order, which is that of the file of a table
    if str(path).endswith((".csv", ".parquet")):
        file = Path(str(path).removesuffix(RESULTS) + PER_IMAGE)
        return _of_table(file, asked) if file.is_file() else {}
    with _directory(path, lambda file: file.name.endswith((SUFFIX, PER_IMAGE))) as results:
        found = {key: own for key in asked if (own := _pseudo_values(per_image_path(results, key))) is not None}
        for file in sorted((results / "tables").glob(f"*{PER_IMAGE}")):
            found |= _of_table(file, [key for key in asked if key not in found])
    return {key: found[key] for key in asked if key in found}


def _of_table(file: Path, keys: Collection[str]) -> dict[str, pd.DataFrame]:
    """{run key: pseudo-values} of those of the runs that are in the file of a table."""
    rows = pd.read_parquet(file)
    runs = rows[rows.key.isin(keys)].groupby("key", observed=True)
    found = {str(key): own.drop(columns="key").dropna(axis=1).set_index("image_id") for key, own in runs}
    return {key: found[key] for key in keys if key in found}


def _pseudo_values(file: Path) -> pd.DataFrame | None:
    """The pseudo-values of a run; None where there are none, or, with a warning, damaged ones."""
    try:
        return pd.read_csv(io.BytesIO(content(file)), dtype={"image_id": str}).set_index("image_id")
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s cannot be read and counts as not there: %s", file, error)
        return None


def _repeated(records: list[Record], variants: Mapping[str, str] | None, times: list[int]) -> pd.DataFrame:
    """What names a run, a row for each of so many."""
    place = pd.DataFrame(
        {
            "model": categories([record.config.model.name for record in records]),
            "method": categories([record.config.pruning.method for record in records]),
            "variant": categories([variant_of(record, variants) for record in records]),
            "sparsity": [record.config.pruning.sparsity for record in records],
            "seed": [record.config.seed for record in records],
            "task": categories([record.config.task.name for record in records]),
            "key": categories([record.key for record in records]),
        }
    )
    return place.loc[place.index.repeat(times)].reset_index(drop=True)


# ---- where results are ----


@contextmanager
def _directory(path: str | Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """A results directory: itself, or the wanted files of one at a URL and all manifests, copied."""
    if "://" not in str(path):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"there is no results directory {str(path)!r}")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        remote, manifests = ObjectStore(str(path), directory), manifest_path(directory, "").parent
        files = [directory / file for file in remote.listing()]
        asked = [file for file in files if file.parent == manifests or wanted(file)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            noted = {file for file in asked if note_path(file) in files}
            copied = threads.map(lambda file: (remote.fetch if file in noted else remote.fetch_file)(file), asked)
            list(copied)
        yield directory


def _found(results: Path, table: str | None) -> tuple[list[Record], dict[str, str] | None, Defaults]:
    """The finished runs of a table, or all, with its names of variants and its defaults; in the order of tables."""
    names = sorted(path.stem for path in manifest_path(results, "").parent.glob("*.json"))
    if table is not None and (table in names or not any((results / "tables").glob(f"{table}{RESULTS}"))):
        manifest = read_manifest(results, table)
        return list(manifest.runs(results)), manifest.variants, manifest.defaults
    if table is not None:
        return [], None, NO_DEFAULTS
    places = (cell.key for name in names for cell in read_manifest(results, name).cells)
    order = {key: number for number, key in enumerate(dict.fromkeys(places))}
    records = sorted(load_records(results), key=lambda record: order.get(record.key, len(order)))
    return records, None, NO_DEFAULTS


def _nothing(path: str | Path, table: str | None, what: str) -> str:
    return f"there is {what} in {str(path)!r}{'' if table is None else f' of table {table!r}'}"


# ---- files of rows ----


def _rows_of(path: str | Path) -> pd.DataFrame:
    """The rows of a CSV file as texts."""
    return _checked(pd.read_csv(path, dtype=str, keep_default_na=False), path)


def _checked(rows: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """The rows, or a ValueError where they are not those of results."""
    if missing := [name for name in (*RUN, "value", "key") if name not in rows]:
        raise ValueError(f"{path} is no file of results: it has no column {', '.join(missing)}")
    return rows


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with columns as `frame` returns them."""
    return pd.DataFrame({name: _values(str(name), column) for name, column in rows.items()})


def _values(name: str, texts: pd.Series) -> Any:
    """What the texts of a column say."""
    start, dot, _ = name.partition(".")
    own: list[Any] = [text or None for text in texts]
    if start in NUMBERS:
        return np.array([np.nan if text is None else float(text) for text in own])
    if name in WHOLE:
        return np.array([int(text) for text in texts], np.int64)
    if name == "finished":
        return pd.to_datetime(own, utc=True)
    if dot and start in PARTS:
        return _setting(own)
    return categories(list(texts) if name == "variant" else own)


def _setting(texts: list[Any]) -> Any:
    """The values of a setting, as numbers where all are."""
    try:
        return column([text and float(text) for text in texts])
    except ValueError:
        return column(texts)

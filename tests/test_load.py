"""Results for pandas: from a results directory, a URL, and the rows that a table is stored with."""

import dataclasses

import fsspec
import numpy as np
import pandas as pd
import pytest
from test_reports import HEADLINES, at_rates, record, runs, table, varied

import vlprune as vp
from vlprune.config import ConfigError, Options
from vlprune.reports.frame import frame
from vlprune.reports.load import per_image_of
from vlprune.reports.publish import publish
from vlprune.reports.uncertainty import of_seeds_and_images
from vlprune.store.artifacts import Note, written
from vlprune.store.manifest import write_manifest
from vlprune.store.per_image import per_image_path, write_per_image
from vlprune.store.record import LOSSES, RECORD, record_text, run_directory
from vlprune.store.remote import RemoteError

LAYERS = {
    "vision.a": {"modality": "vision", "weights": 100, "zeros": 70},
    "text.b": {"modality": "text", "weights": 60, "zeros": 50},
}
ORIGIN = {
    "started": "2026-11-28T09:00:00+00:00",
    "finished": "2026-11-28T09:00:05+00:00",
    "host": "vm",
    "device": "cpu",
    "commit": "0123456",
    "versions": {"torch": "2.14.1", "numpy": "2"},
}


def stored(results, records, name=None, variants=None, defaults=None):
    """A results directory with these runs, and with the manifest of a table of them where it has a name."""
    for own in records:
        with written(run_directory(results, own.key) / RECORD, Note()) as half:
            half.write_text(record_text(own), encoding="utf-8")
    if name is not None:
        write_manifest(results, table(records, name, variants or {own.key: "" for own in records}, defaults))


def full(*arguments, **changes):
    """A finished run as a sweep makes it: with layers and origins."""
    own = record(*arguments, **changes)
    return dataclasses.replace(own, layers=LAYERS, origins={"tuned": {**ORIGIN, "host": "gpu"}, "record": ORIGIN})


def same(one, other):
    """Whether two frames have equal rows, types and categories."""
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    return True


def test_a_results_directory_is_a_row_per_run_and_metric(tmp_path):
    stored(tmp_path, runs(models=("tiny-blip",)))
    long = vp.load_results(str(tmp_path))
    assert len(long) == 10 * 6
    assert long.retention.notna().all()


def test_rows_and_categories_are_in_the_order_of_the_tables(tmp_path):
    records = runs(methods=("snip", "lamp"))
    stored(tmp_path, records, "a table")
    extra = record("other", "omp", 0.75, "vqa")  # of no table
    stored(tmp_path, [extra])
    long = vp.load_results(tmp_path)
    assert list(dict.fromkeys(long.key)) == [own.key for own in (*records, extra)]
    assert list(long.method.cat.categories) == ["dense", "snip", "lamp", "omp"]
    assert list(long.model.cat.categories) == ["tiny-blip", "tiny-xvlm", "other"]
    assert list(long.task.cat.categories) == list(HEADLINES)


def test_a_setting_that_varies_is_a_column_of_its_own(tmp_path):
    records, variants = at_rates({("dense", 1e-4): 80.0, ("omp", 1e-4): 60.0, ("dense", 1e-3): 50.0})
    long = frame([*records, varied(4.0, value=70.0)], variants)
    settings = [name for name in long if name.startswith(("calibration.", "pruning.", "finetuning.", "task."))]
    assert settings == ["calibration.alignment", "finetuning.lr"]
    assert list(long["finetuning.lr"]) == [1e-4, 1e-4, 1e-3, 5e-4]
    assert list(long["calibration.alignment"]) == [1.0, 1.0, 1.0, 4.0]


def test_a_setting_that_a_method_does_not_have_is_missing(tmp_path):
    one, other = record("b", "chita", 0.5, "vqa"), record("b", "omp", 0.5, "vqa")
    pruning = vp.PruningConfig("chita", 0.5, options=Options(lam=0.1, rows="all"))
    long = frame([dataclasses.replace(one, config=dataclasses.replace(one.config, pruning=pruning)), other])
    assert list(long["pruning.options.lam"].fillna(-1)) == [0.1, -1]
    assert list(long["pruning.options.rows"].astype(object).fillna("")) == ["all", ""]


def test_floors_modalities_stages_and_origins_are_columns():
    floors = {"chance": {"accuracy": 5.0}, "question only": {"accuracy": 30.0}}
    (row,) = frame([full("b", "omp", 0.75, "vqa", value=60.0, floors=floors)]).to_dict("records")
    assert (row["floor"], row["floor.chance"], row["floor.question only"]) == (30.0, 5.0, 30.0)
    assert (row["measured_sparsity"], row["measured_sparsity.vision"]) == (0.75, 0.75)
    assert (row["seconds"], row["seconds.tuned"], row["seconds.predictions"]) == (1.5, 1.0, 0.5)
    assert (row["host"], row["device"], row["commit"], row["versions.torch"]) == ("gpu", "cpu", "0123456", "2.14.1")
    assert row["finished"] == pd.Timestamp(ORIGIN["finished"])
    (row,) = frame([record("b", "omp", 0.75, "vqa", floors={})]).to_dict("records")
    assert np.isnan(row["floor"])


def test_a_table_is_chosen_by_its_name_and_gives_its_names(tmp_path):
    records, variants = at_rates({("omp", 1e-4): 60.0, ("omp", 1e-3): 40.0})
    stored(tmp_path, records, "rates", variants)
    stored(tmp_path, [record("b", "lamp", 0.75, "vqa")], "other")
    long = vp.load_results(tmp_path, "rates")
    assert list(long.variant) == ["lr=0.0001", "lr=0.001"]
    assert list(long.label) == ["omp lr=0.0001", "omp lr=0.001"]
    assert set(vp.load_results(tmp_path, "other").method) == {"lamp"}
    with pytest.raises(ConfigError, match=r"no sweep of table 'rate'.*There are: other, rates"):
        vp.load_results(tmp_path, "rate")


def test_a_clone_with_tables_alone_has_the_rows_that_its_runs_have(tmp_path):
    records = [full("b", "dense", 0.0, "vqa", value=80.0), full("b", "omp", 0.75, "vqa", 1), varied(4.0, value=70.0)]
    stored(tmp_path / "here", records, "t")
    long = vp.load_results(tmp_path / "here")
    (tmp_path / "clone").mkdir()
    for name in ("t", "u"):
        publish(table(records, name), records, results=tmp_path / "clone")
    assert same(vp.load_results(tmp_path / "clone", "t"), long)
    assert same(vp.load_results(tmp_path / "clone" / "tables" / "t_results.csv"), long)
    assert same(vp.load_results(tmp_path / "clone"), long)  # a run of two tables is there once
    long.to_parquet(tmp_path / "t.parquet")
    assert same(vp.load_results(tmp_path / "t.parquet"), long)
    assert vp.compare(vp.load_results(tmp_path / "clone")).equals(vp.compare(long))


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    one = dataclasses.replace(full("7", "omp", 0.5, "vqa"), key="1e5", stages={"settings": "0012", "masks": "m"})
    publish(table([one]), [one], results=tmp_path)
    (row,) = vp.load_results(tmp_path).to_dict("records")[:1]
    assert (row["model"], row["key"], row["settings"], row["commit"]) == ("7", "1e5", "0012", "0123456")


def test_layers_are_a_row_each(tmp_path):
    stored(tmp_path, [full("b", "omp", 0.75, "vqa"), full("b", "omp", 0.75, "retrieval")], "t")
    layers = vp.load_layers(tmp_path)
    assert list(layers.columns) == [
        *("model", "method", "variant", "sparsity", "seed", "task"),
        *("layer", "modality", "weights", "zeros", "measured_sparsity", "key"),
    ]
    assert len(layers) == 4
    assert list(layers.task) == ["vqa", "vqa", "retrieval", "retrieval"]
    assert list(layers.measured_sparsity) == [0.7, 50 / 60] * 2
    assert list(layers.modality.cat.categories) == ["vision", "text"]
    assert same(vp.load_layers(tmp_path, "t"), layers)


def test_losses_are_a_row_for_each_step(tmp_path):
    records = [full("b", "omp", 0.75, "vqa"), full("b", "dense", 0.0, "vqa")]  # the second was not trained
    stored(tmp_path, records)
    (run_directory(tmp_path, records[0].key) / LOSSES).write_text("step,loss,lr\n1,2.5,0.0001\n2,2.25,0.0002\n")
    losses = vp.load_losses(tmp_path)
    assert losses[["method", "step", "loss", "lr"]].values.tolist() == [["omp", 1, 2.5, 1e-4], ["omp", 2, 2.25, 2e-4]]


def images_of(results, own, values):
    """The pseudo-values of a run of the metric accuracy, which must have their mean as its value."""
    assert np.mean(values) == pytest.approx(own.metrics["accuracy"])
    write_per_image(results, own.key, {"accuracy": {f"{n:03}": value for n, value in enumerate(values)}})


def compared(tmp_path):
    """Three seeds of two methods with pseudo-values of 40 images, stored; and their differences (seeds, images)."""
    draw = np.random.default_rng(0)
    differences = 3 + draw.normal(0, 2, (3, 40)) + draw.normal(0, 1, 40) + draw.normal(0, 1, (3, 1))
    records = []
    for seed, own in enumerate(differences):
        plain = draw.normal(50, 10, 40)
        for method, values in (("omp", plain), ("lamp", plain + own)):
            records.append(full("b", method, 0.75, "vqa", seed, values.mean()))
            images_of(tmp_path, records[-1], values)
    stored(tmp_path, records, "t")
    return records, differences


def test_pseudo_values_are_a_row_for_each_image(tmp_path):
    records, _ = compared(tmp_path)
    images = vp.load_per_image(tmp_path)
    assert list(images.columns) == [
        *("model", "method", "variant", "sparsity", "seed", "task", "metric", "image_id", "value", "key")
    ]
    assert len(images) == 6 * 40
    means = images.groupby("key", observed=True).value.mean()
    assert all(means[own.key] == pytest.approx(own.metrics["accuracy"], rel=1e-8) for own in records)
    assert list(images.image_id.cat.categories) == [f"{n:03}" for n in range(40)]


def test_the_file_of_pseudo_values_has_the_runs_in_the_order_of_the_table(tmp_path):
    """Another process, in which sets of texts have another order, writes the same bytes."""
    records, _ = compared(tmp_path)
    publish(table(records), records, results=tmp_path)
    keys = [own.key for own in records]
    assert list(dict.fromkeys(pd.read_parquet(tmp_path / "tables" / "t_images.parquet").key)) == keys
    for path in (tmp_path, tmp_path / "tables" / "t_results.csv"):
        assert list(per_image_of(path, [keys[3], keys[0], "unknown", keys[5]])) == [keys[3], keys[0], keys[5]]


def test_compare_knows_the_images_of_what_was_loaded(tmp_path):
    records, differences = compared(tmp_path)
    df = vp.load_results(tmp_path)
    (row,) = vp.compare(df).itertuples()
    found = of_seeds_and_images(differences)
    assert (row.seeds, row.images) == (3, 40)
    assert (row.difference, row.low, row.high, row.p) == pytest.approx((found.mean, *found.interval(), found.p()), 1e-5)
    given = vp.compare(pd.DataFrame(df), images=vp.load_per_image(tmp_path))
    assert same(given, vp.compare(df))
    assert same(vp.compare(df[df.task == "vqa"]), vp.compare(df))
    publish(table(records), records, results=tmp_path)
    (tmp_path / "clone").mkdir()
    (tmp_path / "tables").rename(tmp_path / "clone" / "tables")
    assert same(vp.compare(vp.load_results(tmp_path / "clone")), vp.compare(df))
    assert same(vp.compare(vp.load_results(tmp_path / "clone" / "tables" / "t_results.csv")), vp.compare(df))
    assert same(vp.load_per_image(tmp_path / "clone"), vp.load_per_image(tmp_path))


def test_one_seed_is_compared_over_its_images(tmp_path):
    compared(tmp_path)
    df = vp.load_results(tmp_path)
    (row,) = vp.compare(df[df.seed == 1]).itertuples()
    assert (row.seeds, row.images) == (1, 40)
    assert row.low < row.difference < row.high


def test_without_the_pseudo_values_of_one_run_seeds_alone_are_compared(tmp_path, caplog):
    records, _ = compared(tmp_path)
    path = per_image_path(tmp_path, records[0].key)
    path.write_text(path.read_text().replace("1", "2", 1))
    (row,) = vp.compare(vp.load_results(tmp_path)).itertuples()
    assert (row.seeds, row.images) == (3, 0)
    assert f"{path} cannot be read and counts as not there" in caplog.text


def test_a_url_is_read_like_a_directory(tmp_path):
    url = f"memory://{tmp_path.name}/results"
    records = [full("b", "omp", 0.75, "vqa"), full("b", "lamp", 0.75, "vqa")]
    stored(tmp_path, records, "t")
    (run_directory(tmp_path, records[0].key) / LOSSES).write_text("step,loss,lr\n1,2.5,0.0001\n")
    system, base = fsspec.core.url_to_fs(url)
    system.put(str(tmp_path), base, recursive=True)
    try:
        assert same(vp.load_results(url), vp.load_results(tmp_path))
        assert same(vp.load_results(url, "t"), vp.load_results(tmp_path, "t"))
        assert same(vp.load_layers(url), vp.load_layers(tmp_path))
        assert same(vp.load_losses(url), vp.load_losses(tmp_path))
    finally:
        system.rm(base, recursive=True)
    with pytest.raises(RemoteError, match="nowhere"):
        vp.load_results("nowhere://x/y")


def test_what_is_not_there_is_one_line(tmp_path):
    (tmp_path / "empty" / "tables").mkdir(parents=True)
    for load in (vp.load_results, vp.load_layers, vp.load_losses):
        with pytest.raises(FileNotFoundError, match=r"no results directory '.*none'"):
            load(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match=r"no(r| finished).* in '.*empty'"):
            load(tmp_path / "empty")
    (tmp_path / "means.csv").write_text("model,method,mean\nb,omp,1\n")
    with pytest.raises(ValueError, match=r"means\.csv is no file of results: it has no column variant, .*, key$"):
        vp.load_results(tmp_path / "means.csv")

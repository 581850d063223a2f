import dataclasses
import io
from html.parser import HTMLParser

import fake_pipeline
import numpy as np
import pandas as pd
import pytest
from fake_pipeline import catalogue
from rich.console import Console

from vlprune.config import CalibrationConfig, FinetuningConfig, PruningConfig, RunConfig, TaskConfig
from vlprune.reports.frame import floor_frame, frame, load_results
from vlprune.reports.grid import latex, markdown, terminal
from vlprune.reports.plots import figure, save
from vlprune.reports.publish import publish, render
from vlprune.reports.significance import compare, sign_flip
from vlprune.reports.tables import averages, details, summary
from vlprune.reports.variants import labels
from vlprune.store.keys import Contents
from vlprune.store.record import Record, write_record

HEADLINES = catalogue().headlines


def record(model, method, sparsity, task, seed=0, value=None, code=1, data="scenes", **changes):
    config = RunConfig(
        model=model,
        seed=seed,
        pruning=PruningConfig(method, sparsity),
        task=TaskConfig(name=task, data=data),
        **changes,
    )
    outcome = fake_pipeline.run(config, None)
    metrics = outcome.metrics if value is None else {HEADLINES[task]: value}
    return Record(
        key=f"{model}{method}{sparsity}{task}{seed}{len(changes)}",
        config=config,
        metrics=metrics,
        floors=outcome.floors,
        sparsity=sparsity,
        layer_sparsity={},
        seconds={"finetune": 1.0, "evaluate": 0.5},
        peak_memory=2**30,
        versions={},
        contents=Contents("m", code, "c", 1, 1, data, 1),
    )


def grid(methods=("random", "omp", "lamp"), seeds=(0,), models=("tiny-blip", "tiny-xvlm"), tasks=tuple(HEADLINES)):
    return [
        record(model, method, sparsity, task, seed)
        for model in models
        for method, sparsity in [("dense", 0.0), *((m, s) for m in methods for s in (0.63, 0.75, 0.9))]
        for task in tasks
        for seed in seeds
    ]


def test_one_row_per_run_and_metric_with_its_dense_value():
    long = frame([record("b", "dense", 0.0, "vqa", value=80.0), record("b", "omp", 0.75, "vqa", value=60.0)])
    assert list(long.columns[:10]) == [
        *("model", "method", "variant", "sparsity", "seed", "task", "metric", "value", "dense", "retention")
    ]
    assert list(long.dense) == [80.0, 80.0]
    assert list(long.retention) == [1.0, 0.75]
    assert list(long.seconds) == [1.5, 1.5]


def test_dense_is_of_the_same_seed_and_settings():
    other = FinetuningConfig(steps=7)
    long = frame(
        [
            record("b", "dense", 0.0, "vqa", seed=1, value=80.0),
            record("b", "dense", 0.0, "vqa", seed=0, value=40.0),
            record("b", "omp", 0.75, "vqa", seed=1, value=60.0),
            record("b", "omp", 0.75, "vqa", seed=1, value=60.0, finetuning=other),
        ]
    )
    assert long.retention[2] == 0.75
    assert np.isnan(long.retention[3])
    assert long.settings[2] != long.settings[3]


def test_load_results_reads_a_directory(tmp_path):
    for r in grid(models=("tiny-blip",)):
        write_record(tmp_path / "runs" / r.key, r, [])
    long = load_results(str(tmp_path))
    assert len(long) == 10 * 6
    assert long.retention.notna().all()
    with pytest.raises(FileNotFoundError, match="no results directory"):
        load_results(tmp_path / "none")


def test_no_records_are_an_empty_frame_and_no_tables():
    assert frame([]).empty
    assert summary(frame([]), floor_frame([]), HEADLINES) == []


def test_the_best_method_is_marked_but_not_dense_nor_floors():
    values = {"dense": 80.0, "omp": 60.02, "lamp": 60.04, "snip": 12.0}
    records = [record("b", m, 0.0 if m == "dense" else 0.75, "vqa", value=v) for m, v in values.items()]
    (table,) = summary(frame(records), floor_frame(records), HEADLINES)
    best = {line.label: line.best[0] for block in table.blocks for line in block}
    assert best == {"dense": False, "omp": True, "lamp": True, "snip": False, "most frequent answer": False}
    assert [line.cells for line in table.blocks[1]] == [("60.0",), ("60.0",), ("12.0",)]
    assert table.blocks[2][0].cells == ("19.0",)


def test_a_missing_run_is_a_dash_and_columns_are_grouped_by_sparsity():
    records = [r for r in grid(models=("tiny-blip",)) if r.key != "tiny-blipomp0.75vqa00"]
    (table,) = summary(frame(records), floor_frame(records), HEADLINES)
    names = ("TR@1", "CIDEr", "VQA")
    assert table.groups == (("63 %", names), ("75 %", names), ("90 %", names))
    omp = next(line for line in table.blocks[1] if line.label == "omp")
    assert [i for i, cell in enumerate(omp.cells) if cell == "–"] == [5]
    chance = next(line for line in table.blocks[2] if line.label == "chance")
    assert chance.cells == ("0.3", "–", "–") * 3
    text = markdown(table)
    assert "63 % TR@1" in text
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_several_seeds_are_averaged_with_their_spread():
    records = [record("b", "omp", 0.75, "vqa", seed, value) for seed, value in enumerate([60.0, 62.0, 64.0])]
    (table,) = summary(frame(records), floor_frame(records), HEADLINES)
    assert table.blocks[1][0].cells == ("62.0 ± 2.0",)
    assert table.title == "b, mean ± standard deviation of 3 seeds"
    (row,) = averages(frame(records)).itertuples()
    assert (row.mean, row.std, row.seeds) == (62.0, 2.0, 3)


def test_two_runs_in_one_place_are_refused():
    records = [record("b", "omp", 0.75, "vqa"), record("b", "omp", 0.75, "vqa", finetuning=FinetuningConfig(steps=7))]
    with pytest.raises(ValueError, match=r"several runs of b omp at sparsity 0\.75 on vqa, seed 0"):
        summary(frame(records), floor_frame(records), HEADLINES)


def test_details_have_all_metrics_in_blocks_of_sparsity():
    records = grid(models=("tiny-blip",), tasks=("retrieval",))
    (table,) = details(frame(records), floor_frame(records))
    assert table.groups == (("", ("TR@1", "TR@5", "IR@1")),)
    assert [block[0].label for block in table.blocks] == [
        "dense",
        "random 63 %",
        "random 75 %",
        "random 90 %",
        "chance",
    ]


def test_every_format_holds_every_number():
    records = grid()
    cells = [cell for t in summary(frame(records), floor_frame(records), HEADLINES) for cell in t.blocks[1][0].cells]
    for form in ("markdown", "latex", "html"):
        text = render(records, HEADLINES, form)
        assert all(cell in text for cell in cells)
    assert r"\multicolumn{3}{c}{63 \%}" in render(records, HEADLINES, "latex")
    lines = render(records, HEADLINES, "csv").splitlines()
    assert lines[0] == "model,method,variant,sparsity,task,metric,mean,std,seeds,dense,retention"
    assert len(lines) == 1 + 2 * 10 * 6


@pytest.mark.parametrize(("width", "parts"), [(160, 1), (70, 3)])
def test_a_terminal_table_is_split_by_sparsity_rather_than_cut(width, parts):
    records = grid(models=("tiny-blip",), seeds=(0, 1))
    (table,) = summary(frame(records), floor_frame(records), HEADLINES)
    console = Console(file=io.StringIO(), width=width)
    pieces = terminal(table, console)
    for piece in pieces:
        console.print(piece)
    text = console.file.getvalue()
    assert len(pieces) == parts
    assert "…" not in text
    assert all(cell in text for block in table.blocks for line in block for cell in line.cells)


def test_markup_in_names_is_escaped():
    records = [record("a_b<c>", "omp", 0.75, "vqa")]
    assert "a\\_b" in latex(summary(frame(records), floor_frame(records), HEADLINES)[0])
    text = render(records, HEADLINES, "html")
    assert "a_b&lt;c&gt;" in text
    HTMLParser().feed(text)


def test_figures_have_a_panel_per_model_and_name_everything(tmp_path):
    records = grid(seeds=(0, 1))
    chart = figure(frame(records), floor_frame(records), "captioning", "cider")
    assert [ax.get_title() for ax in chart.axes] == ["tiny-blip", "tiny-xvlm"]
    assert chart.axes[0].get_ylabel() == "CIDEr (×100)"
    assert "sparsity (%" in chart.axes[0].get_xlabel()
    names = [text.get_text() for text in chart.legends[0].get_texts()]
    assert names == ["dense", "random", "omp", "lamp", "floor: constant caption"]
    save(chart, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"no 'cidre' of task 'captioning'"):
        figure(frame(records), floor_frame(records), "captioning", "cidre")


def test_a_dense_only_table_is_published(tmp_path):
    files = publish(
        "d", [record("tiny-blip", "dense", 0.0, "vqa")], HEADLINES, directory=tmp_path, cache=tmp_path / "cache"
    )
    assert [path.name for path in files] == ["d.md", "d.csv", "d_vqa.png"]
    assert all(path.stat().st_size for path in files)


def test_compare_pairs_by_seed():
    values = {"omp": [50.0, 60.0, 70.0], "lamp": [53.0, 64.0, 75.0]}
    records = [record("b", m, 0.75, "vqa", seed, v) for m, vs in values.items() for seed, v in enumerate(vs)]
    records += [record("b", "lamp", 0.75, "vqa", 9, 0.0), record("b", "dense", 0.0, "vqa", 0, 80.0)]
    (row,) = compare(frame(records)).itertuples()
    assert (row.model, row.task, row.metric, row.sparsity, row.method) == ("b", "vqa", "accuracy", 0.75, "lamp")
    assert (row.pairs, row.difference) == (3, 4.0)
    half = 4.302653 * 1 / np.sqrt(3)  # Student's t, two degrees of freedom
    assert (row.low, row.high) == pytest.approx((4 - half, 4 + half), rel=1e-6)
    assert row.p == 0.25
    with pytest.raises(ValueError, match="unknown baseline 'opm'; did you mean 'omp'"):
        compare(frame(records), baseline="opm")


def test_one_seed_gives_a_difference_without_a_p_value():
    records = [record("b", m, 0.75, "vqa", 0, v) for m, v in (("omp", 50.0), ("lamp", 53.0))]
    (row,) = compare(frame(records)).itertuples()
    assert row.difference == 3.0
    assert np.isnan([row.low, row.high, row.p]).all()


def test_sign_flip_counts_by_hand():
    assert sign_flip(np.array([1.0, 2.0, 3.0, -1.0])) == 6 / 16
    assert sign_flip(np.zeros(3)) == 1.0
    with pytest.raises(ValueError, match="up to 16 pairs, got 17"):
        sign_flip(np.ones(17))


def test_compare_keeps_its_columns_when_nothing_pairs():
    records = [record("b", "omp", 0.75, "vqa", 0, 1.0), record("b", "lamp", 0.75, "vqa", 1, 1.0)]
    found = compare(frame(records))
    assert isinstance(found, pd.DataFrame)
    assert found.empty
    assert "difference" in found.columns


def test_compare_keeps_other_data_and_settings_apart():
    other = {"finetuning": FinetuningConfig(steps=7)}
    records = [
        record("b", method, 0.75, "vqa", seed, value + seed, data=data, **changes)
        for data, changes, gap in (("scenes", {}, 2.0), ("photos", {}, 3.0), ("scenes", other, 5.0))
        for method, value in (("omp", 50.0), ("lamp", 50.0 + gap))
        for seed in (0, 1)
    ]
    long = frame(records)
    found = compare(long)
    assert list(zip(found.data, found.difference, found.pairs)) == [
        ("scenes", 2.0, 2),
        ("photos", 3.0, 2),
        ("scenes", 5.0, 2),
    ]
    assert found.settings.nunique() == 3
    with pytest.raises(ValueError, match="several runs of b omp"):
        averages(long)


def test_runs_that_differ_elsewhere_are_named_by_their_keys():
    records = [record("b", "omp", 0.75, "vqa"), dataclasses.replace(record("b", "omp", 0.75, "vqa"), key="other")]
    with pytest.raises(ValueError, match=r"and keys bomp0\.75vqa00 and other: keep the rows of one"):
        compare(frame(records))


def test_dense_is_of_the_same_code():
    records = [record("b", "dense", 0.0, "vqa", value=80.0), record("b", "omp", 0.75, "vqa", value=60.0, code=2)]
    assert np.isnan(frame(records).retention[1])


def test_variants_are_called_by_what_tells_them_apart():
    pairs = [
        ("dense", ""),
        ("omp", "n_batches=16"),
        ("chita++", "n_batches=16"),
        ("chita++", "n_batches=16 alignment=4"),
    ]
    assert labels(pairs) == {
        ("dense", ""): "dense",
        ("omp", "n_batches=16"): "omp",
        ("chita++", "n_batches=16"): "chita++ alignment=1",
        ("chita++", "n_batches=16 alignment=4"): "chita++ alignment=4",
    }
    assert labels([("omp", ""), ("omp", "pattern=2:4")])["omp", ""] == "omp"
    data = labels([("omp", "data=my photos n_batches=2"), ("omp", "n_batches=2")])
    assert list(data.values()) == ["omp data=my photos", "omp data=scenes"]


def varied(alignment, method="chita++", seed=0, value=None, sparsity=0.5, **changes):
    calibration = CalibrationConfig(alignment=alignment)
    one = record("b", method, sparsity, "vqa", seed, value, calibration=calibration, **changes)
    return dataclasses.replace(one, key=f"{one.key} {alignment}")


def test_variants_compete_as_methods_do():
    records = [record("b", "dense", 0.0, "vqa", value=80.0), varied(1.0, value=70.0)]
    records += [record("b", "omp", 0.5, "vqa", value=60.0), varied(4.0, value=75.0)]
    long = frame(records)
    assert list(long.variant) == ["", "", "", "alignment=4"]
    assert list(long.retention) == [1.0, 0.875, 0.75, 0.9375]
    (table,) = summary(long, floor_frame(records), {"vqa": "accuracy"})
    assert [line.label for line in table.blocks[1]] == ["chita++ alignment=1", "chita++ alignment=4", "omp"]
    assert [line.best[0] for line in table.blocks[1]] == [False, True, False]
    assert details(long, floor_frame(records))[0].blocks[1][1].label == "chita++ alignment=4 50 %"
    found = averages(long)
    assert list(zip(found.method, found.variant))[1:] == [("chita++", ""), ("omp", ""), ("chita++", "alignment=4")]
    chart = figure(long, floor_frame(records), "vqa", "accuracy")
    names = [text.get_text() for text in chart.legends[0].get_texts()]
    assert names[:4] == ["dense", "chita++ alignment=1", "chita++ alignment=4", "omp"]


def test_a_baseline_of_one_variant_pairs_with_every_variant_and_one_of_several_is_named():
    records = [varied(a, seed=s, value=70 + a + s) for a in (1.0, 4.0) for s in (0, 1)]
    records += [varied(8.0, "omp", seed=s, value=60.0 + s) for s in (0, 1)]
    found = compare(frame(records))
    assert list(zip(found.method, found.variant, found.difference, found.pairs)) == [
        ("chita++", "", 11.0, 2),
        ("chita++", "alignment=4", 14.0, 2),
    ]
    found = compare(frame(records), baseline="chita++ alignment=1")
    assert list(zip(found.method, found.difference)) == [("chita++", 3.0), ("omp", -11.0)]
    with pytest.raises(
        ValueError, match=r"'chita\+\+' has several variants, .*: chita\+\+ alignment=1, .*alignment=4$"
    ):
        compare(frame(records), baseline="chita++")
    with pytest.raises(ValueError, match=r"unknown baseline 'chita\+\+ alignment=3'; did you mean"):
        compare(frame(records), baseline="chita++ alignment=3")


def test_a_baseline_may_be_another_variant_on_other_data():
    records = [varied(1.0, "omp", value=60.0), varied(1.0, value=61.0)]
    records += [varied(4.0, m, value=v, data="photos") for m, v in (("omp", 50.0), ("chita++", 53.0))]
    found = compare(frame(records))
    assert list(zip(found.data, found.variant, found.difference)) == [
        ("scenes", "", 1.0),
        ("photos", "alignment=4", 3.0),
    ]


def test_a_baseline_without_a_pattern_is_called_by_its_method():
    records = [record("b", method, 0.5, "vqa", value=value) for method, value in (("omp", 60.0), ("lamp", 55.0))]
    one = record("b", "omp", 0.5, "vqa", value=52.0)
    pruning = PruningConfig("omp", 0.5, pattern="2:4")
    records.append(dataclasses.replace(one, key="2:4", config=dataclasses.replace(one.config, pruning=pruning)))
    found = compare(frame(records), baseline="omp")
    assert list(zip(found.method, found.variant, found.difference)) == [
        ("lamp", "", -5.0),
        ("omp", "pattern=2:4", -8.0),
    ]

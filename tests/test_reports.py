"""Records as a frame, as tables, as figures and compared."""

import dataclasses
import io
import random
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from vlprune.config import CalibrationConfig, FinetuningConfig, ModelConfig, PruningConfig, RunConfig, TaskConfig
from vlprune.reports.caption import described
from vlprune.reports.frame import floor_frame, frame
from vlprune.reports.grid import Grid, Line, html_table, latex, markdown, terminal
from vlprune.reports.marks import leaders
from vlprune.reports.plots import figure, save
from vlprune.reports.publish import publish, render
from vlprune.reports.significance import compare
from vlprune.reports.tables import averages, details, summary
from vlprune.reports.variants import find, labels, variant
from vlprune.store.keys import digest
from vlprune.store.manifest import Manifest, Place
from vlprune.store.record import Record

HEADLINES = {"retrieval": "tr_r1", "captioning": "cider", "vqa": "accuracy"}
METRICS = {
    "retrieval": {"tr_r1": 70.0, "tr_r5": 90.0, "ir_r1": 68.0},
    "captioning": {"cider": 400.0, "bleu4": 60.0},
    "vqa": {"accuracy": 82.0},
}
FLOORS = {
    "retrieval": {"chance": {"tr_r1": 0.3, "tr_r5": 1.7, "ir_r1": 0.3}},
    "captioning": {"constant caption": {"cider": 53.0, "bleu4": 9.0}},
    "vqa": {"most frequent answer": {"accuracy": 19.0}},
}
HOSTILE = "a_b <img src=x onerror=alert(1)> \\input{x} $ { ^ ~ | & # % [/c] *d*\n\ne\x1b[2J\udcff"
LITERAL = "a_b <img src=x onerror=alert(1)> \\input{x} $ { ^ ~ | & # % [/c] *d* e?[2J?"


def record(model, method, sparsity, task, seed=0, value=None, code=1, data="scenes", floors=None, **changes):
    """A finished run with plausible numbers, or with a value of its headline metric alone."""
    config = RunConfig(
        model=ModelConfig(model),
        seed=seed,
        pruning=PruningConfig(method, sparsity),
        task=TaskConfig(name=task, data=data),
        **changes,
    )
    kept = (1 - sparsity**6) * random.Random(f"{model}{method}{sparsity}{task}{seed}").uniform(0.8, 1.0)
    metrics = {metric: kept * most for metric, most in METRICS[task].items()}
    return Record(
        key=f"{model}{method}{sparsity}{task}{seed}{len(changes)}",
        config=config,
        metrics=metrics if value is None else {HEADLINES[task]: value},
        floors=FLOORS[task] if floors is None else floors,
        sparsity=sparsity,
        modality_sparsity={"vision": sparsity, "fusion": sparsity},
        layers={},
        seconds={"tuned": 1.0, "predictions": 0.5},
        peak_memory=2**30,
        left_out={},
        origins={},
        stages={"masks": "none", "settings": digest(model, config.finetuning, config.task, code)},
    )


def drawn(records, **more):
    """The grid of the headlines of one model."""
    long = frame(records, **more)
    (grid,) = summary(long, floor_frame(records, more.get("variants")), HEADLINES, leaders(long, {}))
    return grid


def table(records, name="t", variants=None, defaults=None):
    """The manifest of a table of these records."""
    given = {} if variants is None else variants
    places = [
        Place(
            model=own.config.model.name,
            method=own.config.pruning.method,
            variant=given.get(own.key, variant(own.config)),
            sparsity=own.config.pruning.sparsity,
            task=own.config.task.name,
            seed=own.config.seed,
            key=own.key,
        )
        for own in records
    ]
    return Manifest(name, HEADLINES, defaults or {}, tuple(places))


def legend(chart):
    return [text.get_text() for text in chart.legends[0].get_texts()]


def runs(methods=("random", "omp", "lamp"), seeds=(0,), models=("tiny-blip", "tiny-xvlm"), tasks=tuple(HEADLINES)):
    return [
        record(model, method, sparsity, task, seed)
        for model in models
        for method, sparsity in [("dense", 0.0), *((m, s) for m in methods for s in (0.63, 0.75, 0.9))]
        for task in tasks
        for seed in seeds
    ]


def varied(alignment, method="chita++", seed=0, value=None, sparsity=0.5, **changes):
    calibration = CalibrationConfig(alignment=alignment)
    one = record("b", method, sparsity, "vqa", seed, value, calibration=calibration, **changes)
    return dataclasses.replace(one, key=f"{one.key} {alignment}")


def at_rates(values):
    """Runs {(method, lr): value} and their variants; the learning rate is an axis of the table."""
    records, variants = [], {}
    for (method, lr), value in values.items():
        finetuning = FinetuningConfig(lr=lr)
        one = record("b", method, 0.0 if method == "dense" else 0.5, "vqa", value=value, finetuning=finetuning)
        records.append(dataclasses.replace(one, key=f"{method} {lr}"))
        variants[records[-1].key] = f"lr={lr:g}"
    return records, variants


# ---- the frame ----


def test_reports_need_no_torch():
    modules = ("frame", "load", "tables", "plots", "overlaps", "publish", "significance", "variants")
    imports = "".join(f"import vlprune.reports.{module}; " for module in modules)
    subprocess.run([sys.executable, "-c", f"import sys; {imports}assert 'torch' not in sys.modules"], check=True)


def test_one_row_per_run_and_metric_with_its_dense_value():
    long = frame([record("b", "dense", 0.0, "vqa", value=80.0), record("b", "omp", 0.75, "vqa", value=60.0)])
    assert list(long.columns[:10]) == [
        *("model", "method", "variant", "sparsity", "seed", "task", "metric", "value", "dense", "retention")
    ]
    assert list(long.model) == ["b", "b"]
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
            record("b", "omp", 0.75, "vqa", seed=1, value=60.0, code=2),
        ]
    )
    assert long.retention[2] == 0.75
    assert np.isnan(long.retention[3:]).all()
    assert long.settings.nunique() == 3


def test_no_records_are_an_empty_frame_and_no_tables():
    assert frame([]).empty
    assert floor_frame([]).empty
    assert summary(frame([]), floor_frame([]), HEADLINES) == []
    assert details(frame([]), floor_frame([])) == []


# ---- variants ----


def test_a_variant_is_what_the_method_reads_and_differs_from_the_default():
    config = RunConfig(
        calibration=CalibrationConfig(data="/data/photos/", alignment=4.0, n_batches=16),
        pruning=PruningConfig("chita", 0.5, pattern="2:4", options={"lam": 0.1, "blocks": 8}),
        finetuning=FinetuningConfig(lr=1e-3),
    )
    assert variant(config) == "data=photos n_batches=16 alignment=4 pattern=2:4 blocks=8 lam=0.1"
    assert variant(config, {"calibration.alignment", "pruning.options.lam"}) == "alignment=4 lam=0.1"
    assert variant(config, ()) == ""
    assert variant(dataclasses.replace(config, pruning=PruningConfig())) == ""
    assert variant(RunConfig(pruning=PruningConfig("omp", 0.5))) == ""


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
    rates = labels([("dense", ""), ("dense", "lr=0.0001")])
    assert list(rates.values()) == ["dense lr=0.0005", "dense lr=0.0001"]


def test_the_default_of_an_option_is_shown_where_it_is_given():
    pairs = [("chita", ""), ("chita", "lam=0.1"), ("other", ""), ("other", "lam=0.1")]
    assert list(labels(pairs).values()) == ["chita", "chita lam=0.1", "other", "other lam=0.1"]
    given = {"chita": {"lam": "0.01", "blocks": "None"}}
    assert list(labels(pairs, given).values()) == ["chita lam=0.01", "chita lam=0.1", "other", "other lam=0.1"]
    records = [record("b", "chita", 0.5, "vqa"), dataclasses.replace(record("b", "chita", 0.5, "vqa"), key="y")]
    grid = drawn(records, variants={"y": "lam=0.1"}, defaults=given)
    assert [line.label for line in grid.blocks[1]] == ["chita lam=0.01", "chita lam=0.1"]


def test_a_name_finds_the_variants_that_have_its_settings():
    pairs = [("omp", ""), ("chita++", ""), ("chita++", "alignment=4"), ("chita++", "alignment=4 lam=0.1")]
    assert find("omp", pairs) == [("omp", "")]
    assert find("chita++", pairs) == pairs[1:]
    assert find("chita++ alignment=4", pairs) == [("chita++", "alignment=4")]
    assert find("chita++ lam=0.1", pairs) == [("chita++", "alignment=4 lam=0.1")]
    assert find("chita++ alignment=1", pairs) == [("chita++", "")]
    assert find("chita++ alignment", pairs) == find("lamp", pairs) == []


# ---- tables ----


def seeded(values, task="vqa"):
    """Runs of a model at one sparsity: {method: a value for each seed}."""
    return [
        record("b", method, 0.0 if method == "dense" else 0.75, task, seed, value)
        for method, own in values.items()
        for seed, value in enumerate(own)
    ]


def marked(grid):
    return {line.label for block in grid.blocks for line in block if line.best[0]}


def test_what_is_not_distinguishable_from_the_best_is_marked_but_not_dense_nor_floors():
    values = {"dense": [80, 81, 80], "omp": [60, 61, 62], "lamp": [61, 60.5, 62], "snip": [30, 31, 30.5]}
    grid = drawn(seeded(values))
    assert marked(grid) == {"omp", "lamp"}
    assert grid.blocks[2][0].cells == ("19.0",)


def test_what_is_below_a_floor_is_never_marked():
    below = drawn(seeded({"omp": [10, 11, 12], "lamp": [9, 11, 13]}))
    assert marked(below) == set()
    one_above = drawn(seeded({"omp": [19.5, 18.5, 20.5], "lamp": [18.9, 18.4, 19.3]}))
    assert marked(one_above) == {"omp"}


def test_one_seed_without_pseudo_values_marks_nothing():
    grid = drawn(seeded({"omp": [60], "lamp": [90]}))
    assert marked(grid) == set()


def test_pseudo_values_of_images_mark_with_one_seed():
    records = seeded({"omp": [60], "lamp": [61], "snip": [40]})
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 10, 200)
    known = {
        own.key: pd.DataFrame({"accuracy": own.metrics["accuracy"] + noise - noise.mean() + jitter - jitter.mean()})
        for own in records
        for jitter in [draw.normal(0, 10, 200)]
    }
    long = frame(records)
    assert {label for _, label, *_ in leaders(long, known)} == {"omp", "lamp"}
    few = {key: own.iloc[:4] for key, own in known.items()}  # which tell less
    assert {label for _, label, *_ in leaders(long, few)} == {"omp", "lamp", "snip"}


def test_a_best_method_beside_nobody_is_not_marked():
    assert marked(drawn(seeded({"omp": [60, 61, 62]}))) == set()


def test_a_cell_says_how_many_seeds_are_done():
    grid = drawn(seeded({"omp": [60, 61, 62], "lamp": [61, 63]}))
    assert [line.cells for line in grid.blocks[1]] == [("61.0 ± 1.0",), ("62.0 ± 1.4 (2 of 3)",)]


def test_the_caption_says_data_samples_steps_calibration_and_seeds():
    records = runs(methods=("omp",), models=("b",), seeds=(0, 1))
    records = [dataclasses.replace(own, evaluated={"images": 300, "samples": 1800}) for own in records]
    said = " ".join(described(records))
    assert "vqa: 1,800 samples on 300 images of scenes (test), after 40 steps of 32 samples." in said
    assert "Calibration of the methods that need it: 8 batches of 32 pairs of scenes. 2 seeds." in said
    longer = [record("b", "omp", 0.5, "vqa", data="/my/photos", finetuning=FinetuningConfig(epochs=5, steps=None))]
    assert described(longer)[0] == "vqa: photos (test), after 5 epochs of 32 samples."
    tested = [dataclasses.replace(own, evaluated={"images": 7, "samples": 7}) for own in longer]
    assert described([*tested, *records])[0].startswith("vqa: 7 images of photos (test) or 1,800 samples on 300 images")


def test_missing_runs_are_counted_below_the_tables():
    records = runs(methods=("omp",), models=("b",))
    assert "3 of 12 runs are not done." in render(table(records), records[:9], "markdown", {})
    assert "not done" not in render(table(records), records, "markdown", {})


def test_a_missing_run_is_a_dash_and_columns_are_grouped_by_sparsity():
    grid = drawn([r for r in runs(models=("tiny-blip",)) if r.key != "tiny-blipomp0.75vqa00"])
    names = ("TR@1", "CIDEr", "VQA")
    assert grid.groups == (("63 %", names), ("75 %", names), ("90 %", names))
    omp = next(line for line in grid.blocks[1] if line.label == "omp")
    assert [i for i, cell in enumerate(omp.cells) if cell == "–"] == [5]
    chance = next(line for line in grid.blocks[2] if line.label == "chance")
    assert chance.cells == ("0.3", "–", "–") * 3
    text = markdown(grid)
    assert "63 % TR@1" in text
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_a_dense_model_that_has_not_run_is_a_row_of_dashes():
    grid = drawn([record("b", "omp", 0.75, "vqa")])
    assert grid.blocks[0] == (Line("dense", ("–",), (False,)),)


def test_several_seeds_are_averaged_with_their_spread():
    records = [record("b", "omp", 0.75, "vqa", seed, value) for seed, value in enumerate([60.0, 62.0, 64.0])]
    grid = drawn(records)
    assert grid.blocks[1][0].cells == ("62.0 ± 2.0",)
    assert "3 seeds" in grid.title
    (row,) = averages(frame(records)).itertuples()
    assert (row.mean, row.std, row.seeds) == (62.0, 2.0, 3)


def test_two_runs_in_one_place_are_refused_and_named_by_their_keys():
    one = record("b", "omp", 0.75, "vqa")
    for other in (record("b", "omp", 0.75, "vqa", finetuning=FinetuningConfig(steps=7)), one):
        records = [one, dataclasses.replace(other, key="other")]
        with pytest.raises(ValueError, match=rf"b omp .*0\.75.*vqa.*seed 0.*{one.key} and other"):
            summary(frame(records), floor_frame(records), HEADLINES)


def test_details_have_all_metrics_in_blocks_of_sparsity():
    records = runs(models=("tiny-blip",), tasks=("retrieval",))
    (grid,) = details(frame(records), floor_frame(records))
    assert grid.groups == (("", ("TR@1", "TR@5", "IR@1")),)
    assert [block[0].label for block in grid.blocks] == ["dense", "random 63 %", "random 75 %", "random 90 %", "chance"]


def test_variants_compete_as_methods_do():
    records = [record("b", "dense", 0.0, "vqa", value=80.0), varied(1.0, value=70.0)]
    records += [record("b", "omp", 0.5, "vqa", value=60.0), varied(4.0, value=75.0)]
    long = frame(records)
    assert list(long.variant) == ["", "", "", "alignment=4"]
    assert list(long.retention) == [1.0, 0.875, 0.75, 0.9375]
    grid = drawn(records)
    assert [line.label for line in grid.blocks[1]] == ["chita++ alignment=1", "chita++ alignment=4", "omp"]
    assert details(long, floor_frame(records))[0].blocks[1][1].label == "chita++ alignment=4 50 %"
    found = averages(long)
    assert list(zip(found.method, found.variant))[1:] == [("chita++", ""), ("omp", ""), ("chita++", "alignment=4")]
    chart = figure(long, floor_frame(records), "vqa", "accuracy")
    assert legend(chart)[:4] == ["dense", "chita++ alignment=1", "chita++ alignment=4", "omp"]


def test_every_variant_of_the_dense_model_is_a_line_and_what_retention_is_of():
    records, variants = at_rates(
        {("dense", 1e-4): 80.0, ("omp", 1e-4): 60.0, ("dense", 1e-3): 50.0, ("omp", 1e-3): 40.0}
    )
    long, floors = frame(records, variants), floor_frame(records, variants)
    assert list(long.variant) == ["lr=0.0001", "lr=0.0001", "lr=0.001", "lr=0.001"]
    assert list(long.retention) == [1.0, 0.75, 1.0, 0.8]
    for grid in (*summary(long, floors, HEADLINES), *details(long, floors)):
        dense, omp, floor = grid.blocks
        assert {line.label: line.cells for line in dense} == {"dense lr=0.0001": ("80.0",), "dense lr=0.001": ("50.0",)}
        assert [line.label.removesuffix(" 50 %") for line in omp] == ["omp lr=0.0001", "omp lr=0.001"]
        assert [line.label for line in floor] == ["most frequent answer"]
    chart = figure(long, floors, "vqa", "accuracy")
    names = ["dense lr=0.0001", "dense lr=0.001", "omp lr=0.0001", "omp lr=0.001", "floor: most frequent answer"]
    assert legend(chart) == names
    flat = [line for line in chart.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    assert [line.get_ydata()[0] for line in flat] == [80.0, 50.0, 19.0]
    assert len({str(line._dash_pattern) for line in flat}) == 3


def test_a_floor_that_differs_between_variants_of_the_dense_model_is_a_line_for_each():
    variants = {}
    records = []
    for limit, floor in ((10, 20.0), (20, 30.0)):
        for method in ("dense", "omp"):
            one = record("b", method, 0.5 * (method == "omp"), "vqa", floors={"f": {"accuracy": floor}})
            task = dataclasses.replace(one.config.task, limit=limit)
            config = dataclasses.replace(one.config, task=task)
            one = dataclasses.replace(one, key=f"{method}{limit}", config=config, stages={"settings": str(limit)})
            records.append(one)
            variants[one.key] = f"limit={limit}"
    grid = drawn(records, variants=variants)
    assert [(line.label, line.cells) for line in grid.blocks[2]] == [
        ("f limit=10", ("20.0",)),
        ("f limit=20", ("30.0",)),
    ]
    chart = figure(frame(records, variants), floor_frame(records, variants), "vqa", "accuracy")
    assert legend(chart)[-2:] == ["floor: f limit=10", "floor: f limit=20"]


# ---- formats ----


def test_every_format_holds_every_number():
    records = runs()
    cells = [cell for t in summary(frame(records), floor_frame(records), HEADLINES) for cell in t.blocks[1][0].cells]
    for form in ("markdown", "latex", "html"):
        text = render(table(records), records, form, {})
        assert all(cell in text for cell in cells)
    assert len(render(table(records), records, "csv", {}).splitlines()) == 1 + 2 * 10 * 6


def test_csv_is_one_row_per_mean():
    records = [
        record("tiny-xvlm", "dense", 0.0, "vqa", value=80.0),
        varied(4.0, value=70.0, seed=0),
        varied(4.0, value=71.0, seed=1),
    ]
    assert render(table(records), records, "csv", {}) == (
        "model,method,variant,sparsity,task,metric,mean,std,seeds,dense,retention\n"
        "tiny-xvlm,dense,,0,vqa,accuracy,80,,1,80,1\n"
        "b,chita++,alignment=4,0.5,vqa,accuracy,70.5,0.707107,2,,\n"
    )


def test_markdown_is_aligned():
    records = seeded({"dense": [80.0], "omp": [9.96], "lamp": [70.0]})
    grid = drawn(records)
    [dense, methods, floor] = grid.blocks
    marked = (methods[0], dataclasses.replace(methods[1], best=(True,)))
    assert markdown(dataclasses.replace(grid, blocks=(dense, marked, floor))) == (
        "### b\n"
        "\n"
        "| 75 %                 |      VQA |\n"
        "|----------------------|---------:|\n"
        "| dense                |     80.0 |\n"
        "| omp                  |     10.0 |\n"
        "| lamp                 | **70.0** |\n"
        "| most frequent answer |     19.0 |"
    )


def test_latex_has_rules_between_blocks_and_below_groups():
    line = Line("omp", ("1.0 ± 0.1", "–", "3"), (True, False, False))
    grid = Grid("b", (("63 %", ("x", "y")), ("75 %", ("z",))), ((line,), (line, line)))
    row = r"omp & \textbf{1.0 $\pm$ 0.1} & -- & 3 \\"
    assert latex(grid).splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{b}",
        r"\label{tab:table}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{63 \%} & 75 \% \\",
        r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}",
        r" & x & y & z \\",
        r"\midrule",
        row,
        r"\midrule",
        row,
        row,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    assert "cmidrule" not in latex(Grid("b", (("", ("x", "y", "z")),), ((line,),)))


class Cells(HTMLParser):
    """The tags of a page, and the texts of its cells and captions with the style that a cell has."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.ids, self.style = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th", "caption"):
            self.texts.append("")
            self.ids.append(dict(attrs).get("id"))

    def handle_data(self, data):
        if self.tags[-1:] == ["style"]:
            self.style += data
        elif self.tags[-1:] and self.tags[-1] in ("td", "th", "caption"):
            self.texts[-1] += data.strip("\n ")


def test_html_has_the_same_content_with_the_best_in_bold():
    line = Line("omp", ("1.0 ± 0.1", "–", "3"), (True, False, False))
    grid = Grid("b", (("63 %", ("x", "y")), ("75 %", ("z",))), ((line,),))
    page = Cells(html_table(grid))
    assert [text for text in page.texts if text.strip()] == ["b", "63 %", "75 %", "x", "y", "z", "omp", *line.cells]
    best = page.ids[page.texts.index("1.0 ± 0.1")]
    bold = next(rule for rule in page.style.split("}") if best in rule and "bold" in rule)
    assert bold.count("#") == 1
    assert html_table(grid) == html_table(grid)
    other = Cells(html_table(dataclasses.replace(grid, title="c")))
    assert not {*page.ids, *other.ids} - {None} & {*page.ids} & {*other.ids} - {None}


def hostile():
    line = Line(HOSTILE, ("1", "2"), (True, False))
    return Grid(HOSTILE, ((HOSTILE, ("x",)), ("75 %", (HOSTILE,))), ((line,), (line, line)))


def test_hostile_names_are_literal_in_html():
    page = Cells(html_table(hostile()))
    assert set(page.tags) <= {"style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert page.texts.count(LITERAL) == 6


def test_hostile_names_are_literal_in_latex():
    text = latex(hostile())
    literal = (
        r"a\_b \textless{}img src=x onerror=alert(1)\textgreater{} \textbackslash{}input\{x\} \$ \{ \textasciicircum{} "
        r"\textasciitilde{} \textbar{} \& \# \% {[}/c] {*}d{*} e?{[}2J?"
    )
    assert text.count(literal) == 6
    assert text.count("\n") == 17
    assert r"\input" not in text.replace(r"\textbackslash{}input", "")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex on the path")
@pytest.mark.parametrize("options", ["", "[twocolumn]"])
def test_latex_compiles_and_fits_its_column(tmp_path, options):
    """No box is wider than the text: 12 metrics in one column of an article, and beside another."""
    line = Line("chita++ alignment=4 75 %", ("100.0 ± 10.0",) * 12, (True, False) * 6)
    wide = Grid(HOSTILE, (("63 %", ("R mean",) * 6), ("75 %", ("CIDEr",) * 6)), ((line, line), (line,)))
    narrow = Grid("b_c", (("", ("x",)),), ((Line("omp", ("1.0",), (True,)),),))
    head = f"\\documentclass{options}{{article}}\\usepackage{{booktabs,graphicx}}\\begin{{document}}"
    (tmp_path / "t.tex").write_text(
        "\n".join([head, latex(wide, "a b_c"), latex(narrow), r"\ref{tab:a-b-c}\end{document}"])
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-1500:]
    assert "Overfull" not in said


def test_hostile_names_are_literal_in_markdown():
    text = markdown(hostile())
    literal = r"a_b &lt;img src=x onerror=alert(1)&gt; \\input{x} \$ { ^ \~ \| &amp; \# % \[/c\] \*d\* e?\[2J?"
    assert text.count(literal) == 6
    assert len(text.splitlines()) == 2 + 2 + 3
    assert len({line.replace(r"\|", "").count("|") for line in text.splitlines()[2:]}) == 1


def test_hostile_names_are_literal_in_a_terminal_and_in_figures(tmp_path):
    console = Console(file=io.StringIO(), width=1000)
    console.print(*terminal(hostile(), console))
    assert console.file.getvalue().count(LITERAL) == 6
    formula = "$a^{b$ $ {"
    records = [record(formula, "omp", s, "vqa", floors={formula: {"accuracy": 1.0}}) for s in (0.5, 0.75)]
    save(figure(frame(records), floor_frame(records), "vqa", "accuracy"), tmp_path / "x.png")


@pytest.mark.parametrize(("width", "parts"), [(160, 1), (70, 3)])
def test_a_terminal_table_is_split_by_sparsity_rather_than_cut(width, parts):
    grid = drawn(runs(models=("tiny-blip",), seeds=(0, 1)))
    console = Console(file=io.StringIO(), width=width)
    pieces = terminal(grid, console)
    for piece in pieces:
        console.print(piece)
    text = console.file.getvalue()
    assert len(pieces) == parts
    assert "…" not in text
    assert all(cell in text for block in grid.blocks for line in block for cell in line.cells)


def test_figures_have_a_panel_per_model_and_name_everything(tmp_path):
    records = runs(seeds=(0, 1))
    chart = figure(frame(records), floor_frame(records), "captioning", "cider")
    assert [ax.get_title() for ax in chart.axes] == ["tiny-blip", "tiny-xvlm"]
    assert chart.axes[0].get_ylabel() == "CIDEr (×100)"
    assert "sparsity (%" in chart.axes[0].get_xlabel()
    assert legend(chart) == ["dense", "random", "omp", "lamp", "floor: constant caption"]
    save(chart, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"'cidre'.*'captioning'.*'bleu4', 'cider'\]"):
        figure(frame(records), floor_frame(records), "captioning", "cidre")


def test_a_dense_only_table_is_published(tmp_path):
    records = [record("tiny-blip", "dense", 0.0, "vqa")]
    files = publish(table(records, "d"), records, results=tmp_path)
    assert [path.name for path in files] == ["d.md", "d.csv", "d_results.csv", "d_vqa.png"]
    assert all(path.stat().st_size for path in files)


def test_published_files_name_variants_as_the_manifest_does(tmp_path):
    records, variants = at_rates({("dense", 1e-4): 80.0, ("dense", 1e-3): 50.0, ("omp", 1e-3): 40.0})
    publish(table(records, "my table", variants), records, results=tmp_path)
    text = (tmp_path / "tables" / "my table.md").read_text()
    assert "dense lr=0.0001" in text
    assert "(my%20table_vqa.png)" in text
    assert "tiny" not in text
    assert "b,dense,lr=0.0001,0,vqa" in (tmp_path / "tables" / "my table.csv").read_text()


# ---- comparisons ----


def test_compare_pairs_by_seed():
    values = {"omp": [50.0, 60.0, 70.0], "lamp": [53.0, 64.0, 75.0]}
    records = [record("b", m, 0.75, "vqa", seed, v) for m, vs in values.items() for seed, v in enumerate(vs)]
    records += [record("b", "lamp", 0.75, "vqa", 9, 0.0), record("b", "dense", 0.0, "vqa", 0, 80.0)]
    (row,) = compare(frame(records)).itertuples()
    assert (row.model, row.task, row.metric, row.sparsity, row.method) == ("b", "vqa", "accuracy", 0.75, "lamp")
    assert (row.seeds, row.images, row.difference) == (3, 0, 4.0)
    half = 4.302653 * 1 / np.sqrt(3)  # Student's t, two degrees of freedom
    assert (row.low, row.high) == pytest.approx((4 - half, 4 + half), rel=1e-6)
    assert row.p == row.p_holm == pytest.approx(0.0202, abs=1e-4)
    assert not row.equivalent
    with pytest.raises(ValueError, match=r"'opm'.*'omp'"):
        compare(frame(records), baseline="opm")


def test_equal_differences_have_an_interval_of_no_width():
    records = [record("b", m, 0.75, "vqa", seed, v) for m, v in (("omp", 50.0), ("lamp", 50.5)) for seed in range(3)]
    (row,) = compare(frame(records)).itertuples()
    assert (row.difference, row.low, row.high, row.p, row.equivalent) == (0.5, 0.5, 0.5, 0.0, True)
    (row,) = compare(frame(records), margin=0.4).itertuples()
    assert not row.equivalent


def test_one_seed_without_images_gives_a_difference_without_a_p_value():
    records = [record("b", m, 0.75, "vqa", 0, v) for m, v in (("omp", 50.0), ("lamp", 53.0))]
    (row,) = compare(frame(records)).itertuples()
    assert row.difference == 3.0
    assert np.isnan([row.low, row.high, row.p, row.p_holm]).all()
    assert not row.equivalent


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
    assert list(zip(found.data, found.difference, found.seeds)) == [
        ("scenes", 2.0, 2),
        ("photos", 3.0, 2),
        ("scenes", 5.0, 2),
    ]
    assert found.settings.nunique() == 3
    with pytest.raises(ValueError, match="several runs of b omp"):
        averages(long)


def test_a_baseline_of_one_variant_pairs_with_every_variant_and_one_of_several_is_named():
    records = [varied(a, seed=s, value=70 + a + s) for a in (1.0, 4.0) for s in (0, 1)]
    records += [varied(8.0, "omp", seed=s, value=60.0 + s) for s in (0, 1)]
    found = compare(frame(records))
    assert list(zip(found.method, found.variant, found.difference, found.seeds)) == [
        ("chita++", "", 11.0, 2),
        ("chita++", "alignment=4", 14.0, 2),
    ]
    found = compare(frame(records), baseline="chita++ alignment=1")
    assert list(zip(found.method, found.difference)) == [("chita++", 3.0), ("omp", -11.0)]
    with pytest.raises(ValueError, match=r"'chita\+\+'.*chita\+\+ alignment=1, chita\+\+ alignment=4$"):
        compare(frame(records), baseline="chita++")
    with pytest.raises(ValueError, match=r"'chita\+\+ alignment=3'"):
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

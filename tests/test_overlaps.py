"""How far stored masks agree."""

import json
import sys

import pytest
import torch
from test_reports import table

from vlprune.config import CalibrationConfig, FinetuningConfig, ModelConfig, PruningConfig, RunConfig, TaskConfig
from vlprune.masks import Masks
from vlprune.reports.overlaps import chance, heat_map, middle, overlap_frame
from vlprune.reports.publish import publish
from vlprune.store.keys import digest
from vlprune.store.masks import save_masks
from vlprune.store.record import Record


def record(method, sparsity=0.5, seed=0, alignment=1.0, model="b", task="vqa", lr=5e-4):
    """A finished run, whose masks depend on neither its task nor its fine-tuning."""
    pruning, calibration = PruningConfig(method, sparsity), CalibrationConfig(alignment=alignment)
    config = RunConfig(ModelConfig(model), seed, calibration, pruning, FinetuningConfig(lr=lr), TaskConfig(task))
    stages = {"settings": digest(model, lr, task)}
    if method != "dense":
        stages["masks"] = digest(model, seed, calibration, pruning)
    key = f"{method}{sparsity}{seed}{alignment}{model}{task}{lr}"
    return Record(key, config, {"accuracy": 50.0}, {}, sparsity, {}, {}, {"tuned": 1.0}, 1, {}, {}, stages)


def bundle(cache, of, masks=None, provenance=None):
    path = cache / "masks" / f"{of.stages['masks']}.safetensors"
    modality = {"modality": json.dumps({"eye": "vision", "word": "text"})}
    save_masks(path, masks or shifted(of.config.seed, 0), modality if provenance is None else provenance)
    return path


def shifted(eye, word):
    """Masks that keep half of each row, from another column on."""
    half = torch.arange(8).expand(4, 8) < 4
    return Masks({"eye": half.roll(eye, 1), "word": half.roll(word, 1)})


def cell_texts(ax):
    n = len(ax.get_xticks())
    found = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in ax.texts}
    return [[found.get((i, j), "") for j in range(n)] for i in range(n)]


def test_pairs_by_hand(tmp_path):
    records = [record("dense", 0.0), record("omp"), record("lamp"), record("lamp", task="retrieval"), record("snip")]
    bundle(tmp_path, records[1], shifted(0, 0))
    bundle(tmp_path, records[2], shifted(2, 0))  # eye: 2 of 6 a row
    found = overlap_frame(records, tmp_path)
    assert list(zip(found.modality, found.iou)) == [("all", 6 / 10), ("vision", 2 / 6), ("text", 1.0)]
    assert set(zip(found.model, found.method_a, found.method_b, found.chance)) == {("b", "omp", "lamp", 1 / 3)}


def test_models_and_sparsities_are_apart_and_every_pair_of_methods_variants_and_seeds_is_there(tmp_path):
    makers = [("omp", 0, 1.0), ("omp", 1, 1.0), ("chita++", 0, 1.0), ("chita++", 0, 4.0)]
    records = [
        record(method, sparsity, seed, alignment, model)
        for method, seed, alignment in makers
        for sparsity in (0.5, 0.75)
        for model in ("b", "x")
    ]
    for one in records:
        bundle(tmp_path, one)
    found = overlap_frame(records, tmp_path)
    assert len(found) == 2 * 2 * 6 * 3
    own = found.loc[(found.model == "x") & (found.sparsity == 0.75) & (found.modality == "all")]
    a = zip(own.method_a, own.variant_a, own.seed_a)
    b = zip(own.method_b, own.variant_b, own.seed_b)
    assert len({frozenset(pair) for pair in zip(a, b)}) == 6
    # Masks of equal seeds are equal; of others, the eye's are shifted by one: 3 of 5 a row, and 4 of 4 of the word's.
    assert set(zip(own.seed_a == own.seed_b, own.iou)) == {(True, 1.0), (False, 7 / 9)}


def test_masks_that_runs_share_count_once_under_the_settings_that_the_runs_share(tmp_path):
    runs = [
        record("chita++", alignment=a, lr=lr, task=t) for a in (1.0, 4.0) for lr in (1e-4, 1e-3) for t in ("vqa", "x")
    ]
    variants = {r.key: f"alignment={r.config.calibration.alignment:g} lr={r.config.finetuning.lr}" for r in runs}
    for one in runs:
        bundle(tmp_path, one)
    found = overlap_frame(runs, tmp_path, variants)
    assert set(zip(found.variant_a, found.variant_b)) == {("alignment=1", "alignment=4")}
    assert len(found) == 3
    assert set(overlap_frame(runs, tmp_path).variant_b) == {"alignment=4"}


def test_the_heat_map_shows_defaults_of_options(tmp_path):
    runs = [record("chita"), record("chita", alignment=4.0)]
    for one in runs:
        bundle(tmp_path, one)
    found = overlap_frame(runs, tmp_path, {runs[1].key: "lam=0.1"})
    (ax, _) = heat_map(found, 0.5, {"chita": {"lam": "0.01"}}).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["chita lam=0.01", "chita lam=0.1"]


def test_two_random_masks_overlap_by_chance(tmp_path):
    assert chance(0.5) == pytest.approx(0.5 / (2 - 0.5))
    records = [record("random", 0.9, seed) for seed in (0, 1)]
    for seed, one in enumerate(records):
        generator = torch.Generator().manual_seed(seed)
        bundle(tmp_path, one, Masks({"eye": torch.rand(600, 600, generator=generator) > 0.9}), {})
    (row,) = overlap_frame(records, tmp_path).itertuples()
    assert (row.modality, row.seed_a, row.seed_b) == ("all", 0, 1)  # a bundle without modalities
    assert row.iou == pytest.approx(row.chance, abs=0.002)


def test_the_heat_map_pairs_methods_by_seed_and_has_other_seeds_on_its_diagonal(tmp_path):
    shifts = {("omp", 0): 0, ("omp", 1): 2, ("lamp", 0): 2, ("lamp", 1): 2, ("snip", 0): 4}
    records = [record(method, seed=seed) for method, seed in shifts]
    for one, shift in zip(records, shifts.values()):
        bundle(tmp_path, one, shifted(shift, shift))
    chart = heat_map(overlap_frame(records, tmp_path), 0.5)
    ax = chart.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["omp", "lamp", "snip"]
    assert cell_texts(ax) == [["0.33", "0.67", "0.00"], ["0.67", "1.00", "0.33"], ["0.00", "0.33", ""]]
    assert "50 % sparsity" in chart.get_suptitle()
    assert "0.33" in chart.get_supxlabel()
    assert "diagonal" in chart.get_supxlabel()
    assert chart.axes[-1].get_ylabel() == "intersection over union"


def test_the_heat_map_names_variants_and_has_a_panel_per_model(tmp_path):
    records = [record("chita++", alignment=a, model=m) for m in ("b", "x") for a in (1.0, 4.0)] + [record("omp")]
    for one in records:
        bundle(tmp_path, one)
    chart = heat_map(overlap_frame(records, tmp_path), 0.5)
    assert [ax.get_title() for ax in chart.axes[:2]] == ["b", "x"]
    names = [[label.get_text() for label in ax.get_xticklabels()] for ax in chart.axes[:2]]
    assert names == [[*names[1], "omp"], ["chita++ alignment=1", "chita++ alignment=4"]]
    assert all(cell_texts(ax)[i][i] == "" for ax in chart.axes[:2] for i in range(2))
    assert "diagonal" not in chart.get_supxlabel()
    with pytest.raises(ValueError, match=r"0\.9.*\[0\.5\]"):
        heat_map(overlap_frame(records, tmp_path), 0.9)


def test_the_middle_sparsity_is_drawn():
    assert middle([0.9, 0.63, 0.75, 0.75]) == 0.75
    assert middle([0.9, 0.75]) == 0.75


def test_fewer_than_two_bundles_and_damaged_ones_write_no_overlap(tmp_path, caplog):
    records = [record("dense", 0.0), record("omp"), record("lamp")]

    def published():
        files = publish(table(records), records, results=tmp_path)
        assert sorted(files) == sorted((tmp_path / "tables").iterdir())
        return [path.name for path in files if "overlap" in path.name]

    assert published() == []
    bundle(tmp_path / "cache", records[1])
    assert published() == []
    path = bundle(tmp_path / "cache", records[2])
    intact = path.read_bytes()
    path.write_bytes(intact[:-3])
    assert published() == []
    assert path.name in caplog.text
    path.write_bytes(intact)
    assert published() == ["t_overlap.csv", "t_overlap.png"]


def test_without_torch_a_table_is_published_without_its_overlap(tmp_path, monkeypatch, caplog):
    records = [record("omp"), record("lamp")]
    for one in records:
        bundle(tmp_path / "cache", one)
    monkeypatch.setitem(sys.modules, "vlprune.masks", None)  # as where torch is not installed
    files = publish(table(records), records, results=tmp_path)
    assert [path.name for path in files] == ["t.md", "t.csv", "t_results.csv", "t_vqa.png"]
    assert "vlprune.masks" in caplog.text

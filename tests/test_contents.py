from dataclasses import replace

import pytest

from vlprune import contents as module
from vlprune import masking
from vlprune.calibrate.collect import STATISTICS_VERSION
from vlprune.config import PruningConfig, RunConfig
from vlprune.contents import contents
from vlprune.pruners import PRUNERS
from vlprune.sweep.catalogue import catalogue
from vlprune.sweep.table import load_table

OMP = RunConfig(pruning=PruningConfig("omp", 0.75))
TABLE = """
[[grid]]
models = ["tiny-xvlm"]
methods = ["omp", "random"]
sparsities = [0.5, 0.9]
tasks = ["vqa"]
"""


def test_the_dense_run_reads_no_calibration():
    dense, omp = contents(RunConfig()), contents(OMP)
    assert (dense.calibration, dense.statistics_code, dense.method_code) == ("", 0, 0)
    assert omp == replace(dense, calibration=omp.task, statistics_code=STATISTICS_VERSION, method_code=1)


def test_a_raised_version_is_seen_by_tables_and_runs(monkeypatch, tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(TABLE)

    def keys():
        return {cell.config.pruning.method: cell.key for cell in load_table(path, catalogue()).cells}

    before = keys()
    monkeypatch.setitem(PRUNERS, "omp", replace(PRUNERS["omp"], version=2))
    assert {method for method, key in keys().items() if key != before[method]} == {"omp"}
    assert masking.contents(OMP).method_code == 2
    monkeypatch.setattr(module, "STATISTICS_VERSION", STATISTICS_VERSION + 1)
    assert {method for method, key in keys().items() if key != before[method]} == {"omp", "random"}
    monkeypatch.setattr("vlprune.models.VERSION", 2)
    assert {method for method, key in keys().items() if key != before[method]} == {"dense", "omp", "random"}


def test_a_table_reads_each_model_once(monkeypatch, tmp_path):
    path, read = tmp_path / "t.toml", []
    path.write_text(TABLE)
    monkeypatch.setattr("vlprune.models.model_digest", lambda name: read.append(name) or "digest")
    load_table(path, catalogue())
    assert read == ["tiny-xvlm"]


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"unknown model 'tiny-xvln'; did you mean 'tiny-xvlm'\? .*, or a directory"):
        contents(replace(OMP, model="tiny-xvln"))

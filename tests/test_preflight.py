from dataclasses import replace

import pytest

from vlprune import preflight as module
from vlprune.config import CalibrationConfig, ConfigError, PruningConfig, RunConfig, TaskConfig
from vlprune.preflight import preflight


@pytest.fixture
def configs(dataset):
    task, calibration = TaskConfig("vqa", str(dataset)), CalibrationConfig(str(dataset))
    dense = RunConfig(calibration=calibration, task=task)
    return [dense, *(replace(dense, pruning=PruningConfig("omp", s)) for s in (0.5, 0.9))]


def test_each_model_is_loaded_once(configs, monkeypatch):
    loaded = []
    monkeypatch.setattr(module, "load_model", loaded.append)
    preflight(configs)
    assert loaded == ["tiny-xvlm"]


def test_a_broken_model_is_one_line(configs, tmp_path):
    (tmp_path / "config.json").write_text("{\n")
    with pytest.raises(ConfigError, match=rf"^cannot load model '{tmp_path}': \w+: ") as caught:
        preflight([replace(config, model=str(tmp_path)) for config in configs])
    assert "\n" not in str(caught.value)


def test_broken_annotations_are_one_line(configs, dataset):
    (dataset / "test_questions.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load the test examples of vqa in"):
        preflight(configs)


def test_calibration_data_is_looked_at_where_it_is_used(configs, dataset):
    for path in dataset.glob("dataset_*.json"):
        path.unlink()
    preflight(configs[:1])
    with pytest.raises(ConfigError, match="cannot load calibration data"):
        preflight(configs)

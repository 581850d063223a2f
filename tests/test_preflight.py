import json
from dataclasses import replace

import pytest
import torch
from conftest import small_model

from vlprune.config import (
    CalibrationConfig,
    ConfigError,
    FinetuningConfig,
    ModelConfig,
    Options,
    PruningConfig,
    RunConfig,
    TaskConfig,
)
from vlprune.models import build_model, save_model
from vlprune.sweep import preflight as module
from vlprune.sweep.preflight import preflight


@pytest.fixture
def configs(dataset, tmp_path):
    save_model(small_model("xvlm"), tmp_path / "model")
    task, calibration = TaskConfig("vqa", str(dataset)), CalibrationConfig(str(dataset), batch_size=4)
    dense = RunConfig(ModelConfig(str(tmp_path / "model")), calibration=calibration, task=task)
    return [dense, *(replace(dense, pruning=PruningConfig("multiflow", s)) for s in (0.5, 0.9))]


def test_each_model_is_loaded_once(configs, monkeypatch):
    loaded, load = [], module.load_model
    monkeypatch.setattr(module, "load_model", lambda name, options: loaded.append(name) or load(name, options))
    assert preflight(configs) == []
    assert loaded == [configs[0].model.name]


def test_a_broken_model_is_one_line(configs, tmp_path):
    (tmp_path / "config.json").write_text("{\n")
    with pytest.raises(ConfigError, match=rf"^cannot load model '{tmp_path}': \w+: ") as caught:
        preflight([replace(config, model=ModelConfig(str(tmp_path))) for config in configs])
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


def test_calibration_data_must_fill_a_batch(configs):
    large = [replace(config, calibration=replace(config.calibration, batch_size=13)) for config in configs]
    preflight(large[:1])
    with pytest.raises(ConfigError, match=r"a calibration batch needs 13 training images, .* has 12"):
        preflight(large)


def test_a_model_must_be_able_to_do_its_tasks(configs, tmp_path):
    model = build_model({**small_model("blip").config, "trained_for": "retrieval"}, small_model("blip").tokenizer)
    save_model(model, tmp_path / "retriever")
    own = replace(configs[0], model=ModelConfig(str(tmp_path / "retriever")))
    with pytest.raises(ConfigError, match=r"retriever' cannot do vqa; it can do: retrieval$"):
        preflight([own])


def test_images_must_fit_the_patches(configs):
    def sized(size):
        return [replace(configs[0], task=replace(configs[0].task, image_size=size))]

    preflight(sized(48))
    with pytest.raises(ConfigError, match=r"cannot do vqa: the image size must be a multiple of .* 8, got 50"):
        preflight(sized(50))


def test_splits_must_be_there(configs, dataset):
    own = replace(configs[0], task=replace(configs[0].task, train="train+vg"))
    with pytest.raises(ConfigError, match=r"cannot load the train\+vg examples of vqa .* split 'vg'"):
        preflight([own])
    for kind in ("questions", "annotations"):
        (dataset / f"val_{kind}.json").unlink()
    preflight(configs[:1])
    best = replace(configs[0], finetuning=FinetuningConfig(epochs=1, select="best"))
    with pytest.raises(ConfigError, match="cannot load the val examples of vqa"):
        preflight([best])


def test_retrieval_needs_ten_texts(configs):
    retrieval = replace(configs[0].task, name="retrieval")
    preflight([replace(configs[0], task=replace(retrieval, limit=2))])
    with pytest.raises(ConfigError, match=r"^the test examples of retrieval in .* 10 texts.* 5$"):
        preflight([replace(configs[0], task=replace(retrieval, limit=1))])


def test_retrieval_needs_ten_candidates(configs):
    few = replace(configs[0].task, name="retrieval", options=Options(k_test=8))
    with pytest.raises(ConfigError, match=r"k_test must be at least 10.* 8"):
        preflight([replace(configs[0], task=few)])


@pytest.mark.parametrize(("answers", "warned"), [("yes", False), (["yes"] * 3, True), (["yes"] * 4, False)])
def test_a_few_answers_to_a_question_are_warned_of_and_one_is_not(configs, dataset, tmp_path, caplog, answers, warned):
    """With one answer the metric is the exact match; with two or three the accuracy cannot reach 100."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "images").symlink_to(dataset / "images")
    for split in ("train", "test"):
        entries = [{"image": f"{n:04d}.png", "question": "is it?", "answer": answers} for n in range(1, 5)]
        (lists / f"vqa_{split}.json").write_text(json.dumps(entries))
    preflight([replace(configs[0], task=replace(configs[0].task, data=str(lists)))])
    said = f"{lists}: questions have 3 answers: the accuracy of VQA, made for 10, is at most 66.7"
    assert any(said in record.getMessage() for record in caplog.records) == warned


def test_further_metrics_are_looked_for_before_a_sweep(configs, monkeypatch):
    captioning = replace(configs[0].task, name="captioning", extra="meteor")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"^the test examples of captioning in .*: METEOR needs Java"):
        preflight([replace(configs[0], task=captioning)])
    with pytest.raises(ConfigError, match=r"unknown extra metric of captioning 'metor'; did you mean 'meteor'\?"):
        preflight([replace(configs[0], task=replace(captioning, extra="metor"))])
    with pytest.raises(ConfigError, match=r"unknown extra metric of vqa 'meteor'. There are: none"):
        preflight([replace(configs[0], task=replace(captioning, name="vqa"))])


def test_broken_images_are_listed_where_they_are_left_out(configs, dataset):
    (dataset / "images" / "0003.png").write_bytes(b"no picture")
    (dataset / "images" / "0017.png").unlink()
    with pytest.raises(ConfigError, match=r"cannot load the test examples of vqa .*17"):
        preflight(configs[:1])
    left_out = preflight(configs, skip_broken=True)
    assert [any(name in line for line in left_out) for name in ("0003.png", "17", "0004.png")] == [True, True, False]
    assert len(left_out) == 2


def test_known_traps_are_warnings(configs, dataset, caplog):
    (dataset / "answer_list.json").write_text(json.dumps(["maybe", "perhaps"]))
    preflight(configs[:1])
    assert "the answer list of 2 answers has only 0 % of the 120 training answers" in caplog.text


@pytest.mark.parametrize(
    ("processor", "slow"),
    [
        ({"architecture": "x86_64", "cpu_name": "Old One", "avx512_f": True, "avx512_bf16": False}, "Old One"),
        ({"architecture": "arm64", "bf16": False, "sve_max_length": 256}, "arm64"),
        ({"architecture": "x86_64", "cpu_name": "New One", "avx512_bf16": True, "amx_bf16": False}, None),
        ({"architecture": "x86_64", "cpu_name": "New One", "avx512_bf16": False, "amx_bf16": True}, None),
        ({"architecture": "arm64", "bf16": True}, None),
    ],
)
def test_bf16_is_called_slow_where_the_processor_has_no_instructions_for_it(
    processor, slow, configs, caplog, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    preflight([replace(configs[0], finetuning=FinetuningConfig(precision="bf16"))])
    said = "bf16, which is several times slower than fp32 here: this processor"
    assert (f"{said} ({slow}) has no instructions for it" if slow else "") in caplog.text
    assert ("bf16" in caplog.text) == (slow is not None)
    caplog.clear()
    preflight(configs[:1])
    assert "bf16" not in caplog.text


def test_what_torch_says_of_the_processor_here_is_what_the_look_at_bf16_reads():
    processor = torch.cpu.get_capabilities()
    assert isinstance(processor["architecture"], str)
    if processor["architecture"] == "x86_64":
        assert {"avx512_bf16", "amx_bf16"} <= processor.keys()

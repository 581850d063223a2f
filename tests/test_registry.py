"""What a model's name stands for: its family, its options, its fingerprint, its card."""

import json
import os
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from conftest import SMALL, noise_image, small_model
from golden_models import CHECKPOINTS

import vlprune
from eval.options import NoOptions
from vlprune.config import ConfigError
from vlprune.masks import Masks
from vlprune.models import (
    FAMILIES,
    MODELS,
    build_model,
    family_of,
    fingerprint,
    load_model,
    model_card,
    model_fingerprint,
    save_model,
)
from vlprune.models.blip import BLIP, BLIPOptions
from vlprune.models.registry import get_family
from vlprune.models.xvlm import XVLM
from vlprune.models.xvlm.checkpoint import FAMILY


def official(family, path):
    """A small model's state in an official file, with its config beside it; the model."""
    model = small_model(family)
    names = CHECKPOINTS[family].NAMES
    state = {names.to_official(name): parameter for name, parameter in model.state_dict().items()}
    torch.save({"model": state}, path)
    (path.parent / "config.json").write_text(json.dumps(model.config))
    model.tokenizer.save_pretrained(path.parent)
    return model


def test_the_class_of_a_model_is_known_without_building_it(tmp_path, monkeypatch):
    official("blip", tmp_path / "m.pth")
    save_model(small_model("xvlm"), tmp_path / "d")
    torch.save(torch.load(tmp_path / "m.pth"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    found = {name: family_of(name) for name in (*MODELS, *(str(tmp_path / name) for name in ("m.pth", "d", "old.pth")))}
    assert list(found.values()) == [BLIP, XVLM, BLIP, XVLM, BLIP]
    assert found["tiny-blip"].options is BLIPOptions


def test_options_change_the_model_and_what_is_saved_of_it(model, tmp_path, batch):
    save_model(model, tmp_path / "m")
    name, images = str(tmp_path / "m"), [noise_image(0)]
    assert type(model).options is not NoOptions
    assert load_model(name, {}).config == load_model(name).config
    given = load_model(name, {"prompt": "two dogs", "label_smoothing": 0.0})
    assert (given.prompt, given.label_smoothing) == ("two dogs", 0.0)
    wanted = small_model(model.family)
    wanted.label_smoothing, wanted.prompt = 0.0, "two dogs"
    assert given.captioning_loss(images, ["a cat"]).item() == wanted.captioning_loss(images, ["a cat"]).item()
    assert given.captioning_loss(images, ["a cat"]).item() != model.captioning_loss(images, ["a cat"]).item()
    save_model(given, tmp_path / "again")
    again = load_model(str(tmp_path / "again"))
    assert (again.prompt, again.label_smoothing, again.config) == ("two dogs", 0.0, given.config)


def test_the_weight_of_the_similarity_is_an_option_of_xvlm(tmp_path):
    assert load_model("tiny-xvlm").itc_weight == 0
    assert load_model("tiny-xvlm", {"itc_weight": 2}).itc_weight == 2
    with pytest.raises(ConfigError, match=r"model.options: unknown key 'itc_weight'.* There are: prompt, label_smooth"):
        load_model("tiny-blip", {"itc_weight": 2.0})


@pytest.mark.parametrize("options", [{"prompt": 3}, {"label_smoothing": 1.0}, {"label_smoothing": "much"}])
def test_options_out_of_range_are_refused_in_one_line(options):
    with pytest.raises(ConfigError, match=rf"model.options: {next(iter(options))} must be ") as error:
        load_model("tiny-blip", options)
    assert "\n" not in str(error.value)


def test_a_task_that_nobody_knows_asks_for_methods_alone(model):
    assert model.can({"embed_images", "embed_texts"})
    assert model.lacks({"tokens_of", "draw"}) == ("draw",)
    before = [id(parameter) for parameter in model.parameters()]
    model.add_task_head("zeroshot")
    assert [id(parameter) for parameter in model.parameters()] == before


def test_a_fingerprint_is_of_contents_and_not_of_places(tmp_path):
    for name in MODELS:
        shutil.copytree(MODELS[name], tmp_path / name)
        assert model_fingerprint(str(tmp_path / name)) == model_fingerprint(name)
    assert model_fingerprint("tiny-blip") != model_fingerprint("tiny-xvlm")
    (tmp_path / "tiny-blip" / "README.md").write_text("another card")
    assert model_fingerprint(str(tmp_path / "tiny-blip")) == model_fingerprint("tiny-blip")
    official("xvlm", tmp_path / "a.pth")
    before = model_fingerprint(str(tmp_path / "a.pth"))
    (tmp_path / "b").mkdir()
    for path in [path for path in tmp_path.iterdir() if path.is_file()]:
        shutil.move(path, tmp_path / "b" / ("other.pth" if path.suffix == ".pth" else path.name))
    assert model_fingerprint(str(tmp_path / "b" / "other.pth")) == before


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json", "preprocessor_config.json", "m.pth"])
@pytest.mark.parametrize("source", ["m.pth", "directory"])
def test_every_file_that_changes_a_model_counts(source, changed, tmp_path):
    official("blip", tmp_path / "m.pth")
    save_model(small_model("blip"), tmp_path / "directory")
    path = tmp_path / source
    inside = path if path.is_dir() else tmp_path
    if path.is_dir() and changed == "m.pth":
        changed = "model.safetensors"
    before = model_fingerprint(str(path))
    file = inside / changed
    file.write_bytes((file.read_bytes() if file.is_file() else b"{}") + b" ")
    assert model_fingerprint(str(path)) != before


def test_a_large_file_is_read_once_while_it_stays_as_it_is(tmp_path, monkeypatch):
    save_model(small_model("xvlm"), tmp_path)
    before, read = model_fingerprint(str(tmp_path)), []
    whole = fingerprint.hashlib.file_digest
    monkeypatch.setattr(
        fingerprint.hashlib, "file_digest", lambda stream, kind: read.append(stream.name) or whole(stream, kind)
    )
    assert model_fingerprint(str(tmp_path)) == before
    assert read == []
    weights = tmp_path / "model.safetensors"
    times = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times does
    assert model_fingerprint(str(tmp_path)) != before
    assert read == [str(weights)]


def card(model):
    """The card of a model of which everything is kept."""
    masks = Masks({layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in model.graph})
    return model_card(model, masks, {"model": "m 0123456789abcdef", "method": "none"})


def test_a_card_names_the_classes_that_hold_the_model():
    text = card(small_model("blip"))
    for name in ("BlipForImageTextRetrieval", "BlipForConditionalGeneration", "BlipForQuestionAnswering"):
        assert name in text
    assert "trust_remote_code=True" in card(small_model("xvlm"))
    config = small_model("blip").config
    narrow = {**config["vision"], "hidden_size": 16, "intermediate_size": 32}
    config = {**config, "vision": narrow, "text": {**config["text"], "encoder_hidden_size": 16}}
    tokenizer = small_model("blip").tokenizer
    text = card(build_model(config, tokenizer))
    assert "BlipForConditionalGeneration" in text
    assert "BlipForQuestionAnswering" not in text
    assert "vlprune.load_model(DIRECTORY)" in card(build_model({**config, "trained_for": "vqa"}, tokenizer))


class Summed(XVLM):
    """X-VLM that ranks by the sum, a family of its own."""

    family = "summed"


def test_a_family_is_a_class_and_a_line(tmp_path, monkeypatch):
    module = ModuleType("summed")
    module.FAMILY = replace(FAMILY, adapter=Summed)
    monkeypatch.setitem(sys.modules, "summed", module)
    monkeypatch.setitem(FAMILIES, "summed", "summed")
    model = build_model({**small_model("xvlm").config, "family": "summed"}, small_model("xvlm").tokenizer)
    save_model(model, tmp_path / "m")
    assert family_of(str(tmp_path / "m")) is Summed
    again = vlprune.load_model(str(tmp_path / "m"))
    assert type(again) is Summed
    assert (tmp_path / "m" / "modeling_xvlm.py").is_file()


def test_names_of_families_are_those_of_their_classes():
    assert {name: get_family(name).adapter.family for name in FAMILIES} == {name: name for name in FAMILIES}
    with pytest.raises(ValueError, match=r"unknown model family 'blib'; did you mean 'blip'"):
        build_model({**SMALL["blip"], "family": "blib"}, small_model("blip").tokenizer)


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    for name in ("blip", "open_clip", "blip:nothing", str(tmp_path)):
        with pytest.raises((ValueError, OSError)) as error:
            load_model(name)
        assert "\n" not in str(error.value)

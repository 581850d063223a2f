"""What a model is saved as loads in plain transformers, and what others saved loads here."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import noise_image, small_model
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
)

from eval import TASKS, get_task
from vlprune.data import load_pairs, load_questions
from vlprune.masks import apply_masks
from vlprune.models import build_model, load_model, save_model
from vlprune.stages.masks import compute_masks

CLASSES = {
    "retrieval": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
}
IMAGES = [noise_image(i) for i in range(2)]
TEXTS = ["a red circle", "a man riding a horse on the beach"]

PLAIN = """
import json, sys, torch
torch.set_num_threads(1)  # as the tests: how products are split among threads decides the last bits
from transformers import AutoModel, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
directory, family, given = sys.argv[1:]
x = torch.load(given)
with torch.no_grad():
    if family == "xvlm":
        model = AutoModel.from_pretrained(directory, trust_remote_code=True)
        out = model(x["pixels"], x["ids"], x["mask"].long())
        found = {"itm": out["itm_logits"], "sim": out["image_features"] @ out["text_features"].T}
    else:
        model = BlipForImageTextRetrieval.from_pretrained(directory)
        mask = x["mask"].long()
        itm = model(x["grounded"], x["pixels"], attention_mask=mask).itm_score
        sim = model(x["ids"], x["pixels"], attention_mask=mask, use_itm_head=False).itm_score
        model = BlipForConditionalGeneration.from_pretrained(directory)
        images = model.vision_model(x["pixels"]).last_hidden_state
        logits = model.text_decoder(x["decoder"], encoder_hidden_states=images, use_cache=False).logits
        model = BlipForQuestionAnswering.from_pretrained(directory)
        question = model.text_encoder(x["grounded"], mask, encoder_hidden_states=images).last_hidden_state
        answer = model.text_decoder(x["decoder"], encoder_hidden_states=question[:1], use_cache=False).logits[:1]
        found = {"itm": itm, "sim": sim, "logits": logits, "answer": answer}
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
assert not any(name.split(".")[0] in ("vlprune", "eval") for name in sys.modules)
torch.save({**found, "zeros": zeros}, given)
"""


def ours(model):
    """What the plain libraries must give as well, and the tensors to give them."""
    with torch.no_grad():
        pixels = model.pixels(IMAGES)
        images, texts = model.encode_images(pixels), model.encode_texts(TEXTS)
        fused = model.fuse(texts, images)
        given = {"pixels": pixels, "ids": texts.tokens.ids, "mask": texts.tokens.attention_mask}
        wanted = {"itm": model.itm_head(fused[:, 0])}
        wanted["sim"] = model.image_features(images) @ model.text_features(texts.hidden).T
        if model.family == "blip":
            given["grounded"] = given["ids"].clone()
            given["grounded"][:, 0] = model.token_id("[ENC]")
            target = model.target_tokens(["a red circle", "two blue circles"])[0]
            given["decoder"] = target.ids
            wanted["logits"] = model.decode("caption", target, images, None)
            one = type(target)(target.ids, torch.ones_like(target.attention_mask))
            answer = model.decode("answer", one, fused[:1].expand(2, -1, -1), None)[:1]
            wanted["answer"] = answer
    return given, wanted


def test_a_pruned_model_loads_without_this_project_and_gives_the_same(model, tmp_path):
    apply_masks(model, compute_masks(model, "omp", 0.5))
    save_model(model, tmp_path / "pruned")
    given, wanted = ours(model)
    torch.save(given, tmp_path / "x.pt")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "pruned"), model.family, str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "x.pt")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)
    assert found["zeros"] >= round(0.5 * model.graph.n_edges)


def test_saving_again_what_was_loaded_changes_nothing(model, tmp_path):
    save_model(model, tmp_path / "a")
    save_model(load_model(str(tmp_path / "a")), tmp_path / "b")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_an_xvlm_that_transformers_saved_again_is_tied_and_loads_here(tmp_path):
    from transformers import AutoModel

    model = small_model("xvlm")
    save_model(model, tmp_path / "a")
    plain = AutoModel.from_pretrained(tmp_path / "a", trust_remote_code=True)
    words = plain.text_encoder.embeddings.word_embeddings.weight
    assert plain.text_encoder.cls.predictions.decoder.weight is words
    plain.save_pretrained(tmp_path / "b")
    model.tokenizer.save_pretrained(tmp_path / "b")
    again = load_model(str(tmp_path / "b"))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_a_damaged_tokenizer_is_named(tmp_path):
    save_model(small_model("blip"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer: EOF"):
        load_model(str(tmp_path))


@pytest.fixture(params=sorted(CLASSES))
def transformers_blip(request, tmp_path):
    """(task, a random BLIP of transformers for it, the directory it was saved in with a tokenizer)."""
    small = small_model("blip")
    vision, text = small.vision_model.config, small.text_encoder.config
    torch.manual_seed(1)
    sizes = {"vision_config": vision.to_dict() | {"initializer_range": 0.02}, "text_config": text.to_dict()}
    hf = CLASSES[request.param](BlipConfig(**sizes, image_text_hidden_size=16)).eval()
    for module in hf.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    hf.save_pretrained(tmp_path / "hf")
    small.tokenizer.save_pretrained(tmp_path / "hf")
    return request.param, hf, tmp_path / "hf"


def test_a_blip_of_transformers_becomes_a_model_of_its_task(transformers_blip, batch):
    task, hf, directory = transformers_blip
    model = load_model(str(directory))
    assert [name for name, other in TASKS.items() if model.can(other.needs)] == [task]
    with torch.no_grad():
        pixels = model.pixels(IMAGES)
        images = model.encode_images(pixels)
        torch.testing.assert_close(images, hf.vision_model(pixels).last_hidden_state, atol=0, rtol=0)
        if task != "captioning":
            texts = model.tokenize(TEXTS)
            mask = texts.attention_mask.long()
            own = model.encode_tokens(texts)
            torch.testing.assert_close(own, hf.text_encoder(texts.ids, mask).last_hidden_state, atol=0, rtol=0)
        if task != "retrieval":
            target = model.target_tokens(["a red circle", "two blue circles"])[0]
            logits = model.decode("caption", target, images, None)
            plain = hf.text_decoder(target.ids, encoder_hidden_states=images, return_dict=True).logits
            torch.testing.assert_close(
                logits[target.attention_mask], plain[target.attention_mask], atol=1e-6, rtol=1e-6
            )
    losses = model.pretraining_losses(batch, torch.Generator().manual_seed(0))
    assert set(losses) == set(model.scored_losses)
    sum(losses.values()).backward()
    for layer in model.graph:
        if task == "retrieval" or not layer.name.startswith("text_encoder"):
            assert model.weight(layer.name).grad.abs().sum() > 0, layer.name
    model.add_task_head(task)
    assert {layer.name for layer in model.graph} == {model.layer_of(layer.name + ".weight") for layer in model.graph}


def test_a_blip_of_transformers_does_its_task(transformers_blip, dataset, own_caches):
    name, _, directory = transformers_blip
    model, task = load_model(str(directory)), get_task(name)
    load = {"pairs": load_pairs, "questions": load_questions}[task.examples]
    examples = load(str(dataset), "test")
    with torch.inference_mode():
        prepared = ["red", "two circles"] if name == "vqa" else None
        predictions = task.predict(model, examples, task.options(), prepared)
    scores = task.score(predictions, examples.remove_columns("image").to_list())
    assert task.headline in scores
    assert task.loss(model, [examples[place] for place in range(4)], torch.Generator()).isfinite()


@pytest.mark.parametrize("method", ["multiflow", "snip"])
def test_a_blip_of_transformers_is_pruned(transformers_blip, batch, method):
    from vlprune.calibrate.collect import collect
    from vlprune.pruners import PRUNERS

    model = load_model(str(transformers_blip[2]))
    masks = compute_masks(model, method, 0.75, stats=collect(model, [batch], PRUNERS[method].needs))
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == model.graph.n_edges - round(0.75 * model.graph.n_edges)


def test_a_tokenizer_without_blips_tokens_gets_them(tmp_path):
    small = small_model("blip")
    config = {**small.config, "text": {**small.config["text"], "vocab_size": len(small.tokenizer)}}
    save_model(build_model(config, small.tokenizer), tmp_path / "m")
    plain = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    # As transformers' BLIP has it: the last two ids belong to no piece.
    vocabulary = plain["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[-2:]
    for token in last:
        del vocabulary[token]
    for token, index in (("[DEC]", 5), ("[ENC]", 6)):
        del vocabulary[token]
        vocabulary[f"[unused{index}]"] = index
    plain["added_tokens"] = [entry for entry in plain["added_tokens"] if entry["content"] not in ("[DEC]", "[ENC]")]
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(plain))
    model = load_model(str(tmp_path / "m"))
    assert [model.token_id("[DEC]"), model.token_id("[ENC]")] == [len(small.tokenizer) - 2, len(small.tokenizer) - 1]


def test_files_that_are_no_model_are_refused_in_one_line(tmp_path):
    def refused(config, match):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=match):
            load_model(str(tmp_path))

    small = small_model("blip")
    save_model(small, tmp_path)
    refused("{", "is no JSON")
    refused("[]", "must hold the settings of a model")
    refused('{"model_type": "clip"}', "unknown family 'clip'.* There are: blip, xvlm")
    with pytest.raises(OSError, match="there is no directory 'nobody/nothing', and the hub does not give it"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/dev/zero", "a/b.safetensors"])
def test_an_index_names_files_beside_it_alone(name, tmp_path):
    save_model(small_model("blip"), tmp_path / "other")
    save_model(small_model("blip"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"temp": name}}))
    with pytest.raises(ValueError, match=r"index.json is no index of weights: .* is no name of a file beside it"):
        load_model(str(tmp_path / "m"))


def test_weights_in_half_precision_are_those_in_full_that_they_stand_for(tmp_path):
    model = small_model("xvlm")
    save_model(model, tmp_path, torch.float16)
    again = load_model(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.half().float())


def test_defaults_of_transformers_are_kept(tmp_path):
    """A hub config names only what differs from the defaults, among them the vision's epsilon 1e-5."""
    text = BlipTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=2048)
    vision = BlipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    hf = BlipForImageTextRetrieval(BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    hf.save_pretrained(tmp_path)
    small_model("blip").tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.vision_model.config.layer_norm_eps == 1e-5
    assert model.text_encoder.config.projection_dim == hf.config.text_config.projection_dim

"""Official checkpoints and mask files, on the reference's tiny models and on files made here."""

import argparse
import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from conftest import small_model
from golden_models import CHECKPOINTS, decoder_tokens, official, record, tokens_of
from safetensors.torch import load_file
from torch import nn

from vlprune.calibrate.inputs import Inputs
from vlprune.masks import Masks
from vlprune.models import build_model, load_model, save_model
from vlprune.models.fusion import TextStates
from vlprune.models.official_masks import export_masks, import_masks
from vlprune.models.text import Tokens
from vlprune.stages.masks import compute_masks

BLIP = CHECKPOINTS["blip"].NAMES


@pytest.fixture
def blip(shared, tmp_path):
    """The reference's tiny BLIP and its batches."""
    return official("blip", shared, tmp_path)


def test_gradients_of_blips_losses(blip, shared):
    """Of general batch 0, with the reference's negatives; its ITC within the batch, as ours is."""
    model, batches = blip
    stored = load_file(shared / "golden" / "gradients_blip.safetensors")
    n, tokens = torch.arange(4), tokens_of(batches, "general.0")
    images = model.encode_images(batches["general.0.0"])
    states = TextStates(tokens, model.encode_tokens(tokens))
    features = model.image_features(images), model.text_features(states.hidden)
    target = decoder_tokens(batches, "general.0", model)
    logits = model.decode("caption", target, images, None)
    losses = {
        "itc_inbatch": model.itc_loss(*features, torch.eye(4, dtype=torch.bool)),
        "itm": model.itm_loss(states, images, model.fuse(states, images), ((n + 1) % 4, (n + 2) % 4)),
        "lm": model.sequence_losses(logits, target, 1).sum() / target.attention_mask[:, 1:].sum(),
    }
    compared = 0
    for loss, value in losses.items():
        model.zero_grad()
        value.backward(retain_graph=True)
        for name, gradient in stored.items():
            if name.startswith(f"{loss}."):
                layer = model.layer_of(BLIP.to_ours(name.removeprefix(f"{loss}.")))
                found = model.weight(layer).grad
                found = torch.zeros_like(gradient) if found is None else found
                tolerance = max(5e-6, 1e-5 * float(gradient.abs().max()))
                torch.testing.assert_close(found, gradient, atol=tolerance, rtol=0)
                compared += 1
    assert compared >= 2 * len(model.graph)


@pytest.mark.parametrize("percent", [63, 75, 90])
def test_masks_of_multiflow_from_the_checkpoint(blip, shared, percent):
    """Those of the reference but for the entries that exact counts imply."""
    model, batches = blip
    stored = load_file(shared / "golden" / "multiflow_blip.safetensors")
    inputs = Inputs(model, list(model.graph), outer=False)
    inputs.active = True
    with inputs.hooked(), torch.no_grad():
        record(model, batches)
    inputs.add()
    stats = {layer.name: inputs.means(layer.name) for layer in model.graph}
    masks = compute_masks(model, "multiflow", percent / 100, stats=stats)
    differing = 0
    for layer in model.graph:
        wanted = stored[f"mask{percent}.{BLIP.to_official(layer.name)}.weight"].bool()
        differing += int((masks[layer.name] != wanted).sum())
        surplus = int(masks[layer.name].sum()) - int(wanted.sum())
        assert int((masks[layer.name] != wanted).sum()) == abs(surplus) <= 2, layer.name
    assert differing <= len(model.graph) / 4


def test_answers_of_a_blip_with_unequal_widths(blip, shared):
    """The reference's VQA, with the fresh keys and values that it drew."""
    model, batches = blip
    stored = load_file(shared / "golden" / "downstream_blip.safetensors")
    model.add_task_head("vqa")
    for name, value in stored.items():
        if name.startswith("vqa_fresh."):
            with torch.no_grad():
                model.get_parameter(name.removeprefix("vqa_fresh.")).copy_(value)
    questions = Tokens(stored["vqa_question_ids"], stored["vqa_question_atts"].bool())
    pixels = torch.cat([batches[f"general.{i}.0"] for i in range(3)])[: len(questions.ids)]
    with torch.no_grad():
        states = model.fuse(TextStates(questions, torch.empty(0)), model.encode_images(pixels))
        mask = questions.attention_mask
        torch.testing.assert_close(states[mask], stored["vqa_question_states"][mask], atol=1e-5, rtol=0)
        start = Tokens(torch.full((len(states), 1), model.start_id), torch.ones(len(states), 1, dtype=torch.bool))
        first = model.decode("answer", start, states, mask)[:, 0]
        torch.testing.assert_close(first, stored["vqa_first_token_logits"], atol=1e-5, rtol=0)
        answers = Tokens(stored["vqa_answer_ids"], stored["vqa_answer_atts"].bool())
        n, k = len(states), len(answers.ids)
        rows = torch.arange(n).repeat_interleave(k)
        tiled = Tokens(answers.ids.repeat(n, 1), answers.attention_mask.repeat(n, 1))
        losses = model.sequence_losses(model.decode("answer", tiled, states[rows], mask[rows]), tiled, 1)
        torch.testing.assert_close(losses.view(n, k), stored["vqa_sequence_loss"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_mask_files_have_the_references_names_and_shapes(family, shared, tmp_path):
    model, _ = official(family, shared, tmp_path)
    masks = compute_masks(model, "omp", 0.75)
    export_masks(masks, model, str(tmp_path / "masks.pth"))
    written = torch.load(tmp_path / "masks.pth", weights_only=True)
    stored = load_file(shared / "golden" / f"{family}_tiny_model_and_batches.safetensors")
    weights = {k.removeprefix("state."): v.shape for k, v in stored.items() if k.endswith(".weight") and v.ndim == 2}
    for name, mask in written.items():
        if name.endswith(".weight_pruning_mask"):
            assert mask.shape == weights[name.removesuffix("_pruning_mask")], name
    again = import_masks(tmp_path / "masks.pth", model)
    assert all(torch.equal(again[name], masks[name]) for name in masks)


def test_masks_of_the_reference_are_read(blip, shared, tmp_path):
    """Bool, float and under tied names; heads and biases are ones."""
    model, _ = blip
    stored = load_file(shared / "golden" / "multiflow_blip.safetensors")
    state = OrderedDict()
    for name, mask in stored.items():
        if name.startswith("mask75."):
            module = name.removeprefix("mask75.").removesuffix(".weight")
            state[f"{module}.weight_pruning_mask"] = mask.bool()
            state[f"{module}.bias_pruning_mask"] = torch.ones(len(mask))
            if module.startswith("text_encoder") and ".attention." not in module:
                state["text_decoder.bert." + module.removeprefix("text_encoder.") + ".weight_pruning_mask"] = (
                    mask.float()
                )
    state["itm_head.weight_pruning_mask"] = torch.ones(2, 32)
    torch.save(state, tmp_path / "masks.pth")
    masks = import_masks(tmp_path / "masks.pth", model)
    for name, mask in masks.items():
        assert torch.equal(mask, stored[f"mask75.{BLIP.to_official(name)}.weight"].bool())
    masks.apply(model)
    state["itm_head.weight_pruning_mask"][0, 0] = 0
    torch.save(state, tmp_path / "masks.pth")
    with pytest.raises(ValueError, match=r"itm_head.weight_pruning_mask prunes what is not prunable in blip"):
        import_masks(tmp_path / "masks.pth", model)
    state["itm_head.weight_pruning_mask"][0, 0] = 0.5
    torch.save(state, tmp_path / "masks.pth")
    with pytest.raises(ValueError, match=r"itm_head.weight_pruning_mask must hold 0 and 1 alone"):
        import_masks(tmp_path / "masks.pth", model)


def checkpoint(family, path, **changes):
    """A small model's state as an official file, with momentum copies, a queue and positions."""
    model = small_model(family)
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name != "text_decoder.cls.predictions.bias" and name != "text_encoder.cls.predictions.bias":
            names[CHECKPOINTS[family].NAMES.to_official(name)] = parameter.detach().clone()
    if family == "blip":
        names["visual_encoder_m.cls_token"] = torch.randn(1, 1, 32)
        names["image_queue"] = torch.randn(16, 8)
        names["queue_ptr"] = torch.zeros(1, dtype=torch.long)
        names["text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    names.update(changes)
    torch.save({"model": names, "epoch": 3, "config": {"lr": 1e-4}}, path)
    model.tokenizer.save_pretrained(path.parent)
    return model


@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_a_checkpoint_file_is_a_model_by_its_name(family, tmp_path, batch):
    path = tmp_path / "pretrained.pth"
    model = checkpoint(family, path)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    again = load_model(str(path))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=0, rtol=0)
    (tmp_path / "config.json").unlink()
    heads = CHECKPOINTS[family].load_official(path, heads=(2, 2))  # sizes from the shapes alone
    pairs = replace(batch, regions=())  # how many layers look at regions by themselves no shape tells
    losses = [m.pretraining_losses(pairs, torch.Generator().manual_seed(0)) for m in (model, heads)]
    for name in model.scored_losses:
        torch.testing.assert_close(losses[0][name], losses[1][name], atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"width 32 is no multiple of 64: put a config.json beside the checkpoint"):
        load_model(str(path))


def test_bad_checkpoint_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "bad.pth"

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            load_model(str(path))
        assert "\n" not in str(error.value)

    checkpoint("blip", path, **{"text_decoder.bert.embeddings.LayerNorm.weight": torch.zeros(32)})
    (tmp_path / "config.json").write_text(json.dumps(small_model("blip").config))
    refused(r"text_encoder.embeddings.LayerNorm.weight.* are one tensor of the model, but differ")
    checkpoint("blip", path, **{"itm_head.bias": torch.full((2,), torch.nan)})
    refused("itm_head.bias holds NaN")
    checkpoint("blip", path, **{"visual_encoder.head.weight": torch.zeros(2)})
    refused("0 names are missing and 1 unknown, e.g. visual_encoder.head.weight")
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, path)
    refused(r"blip \(visual_encoder.…\), xvlm \(vision_encoder.…\); its names begin with: layer")
    torch.save({"model": {"vision_encoder.layers.0.blocks.0.norm1.weight": torch.zeros(2)}}, path)
    refused("Swin")
    torch.save({"model": OrderedDict, "x": Masks}, path)
    refused("holds more than tensors")
    torch.save({"model": {0: torch.zeros(2)}}, path)
    refused("holds no state dict of tensors")
    checkpoint("blip", path, **{"itm_head.bias": torch.zeros(2, dtype=torch.int8)})
    refused("itm_head.bias must hold floating-point weights, got torch.int8")
    checkpoint("blip", path)
    (tmp_path / "config.json").write_text('{"family": "blip"}')
    refused("with 'vision' and 'text' beside a 'family'")
    (tmp_path / "config.json").unlink()
    torch.save({"visual_encoder.norm.weight": torch.zeros(2)}, path)
    refused("its sizes cannot be told: 'vision_model.embeddings.position_embedding'")
    torch.save({"state": {}, "args": argparse.Namespace()}, path)
    refused("holds more than tensors and plain values: argparse.Namespace")
    path.write_bytes(path.read_bytes()[:50])
    refused("is damaged")


def test_answers_read_states_of_the_texts_width(tmp_path):
    """An official VQA checkpoint whose images are wider than its texts; its decoder never sees images."""
    config = small_model("blip").config
    vision = {**config["vision"], "hidden_size": 64}
    config = {**config, "vision": vision, "trained_for": "vqa"}
    config["text"] = {**config["text"], "encoder_hidden_size": 64}
    model = build_model(config, small_model("blip").tokenizer).eval()
    layer = "encoder.layer.0.crossattention.self.key"
    assert model.weight(f"text_encoder.{layer}").shape == (32, 64)
    assert model.weight(f"text_decoder.bert.{layer}").shape == (32, 32)
    names = {BLIP.to_official(name): p for name, p in model.state_dict().items()}
    torch.save({"model": names}, tmp_path / "vqa.pth")
    model.tokenizer.save_pretrained(tmp_path)
    again = CHECKPOINTS["blip"].load_official(tmp_path / "vqa.pth", heads=(2, 2))
    states, mask = again.encode_questions(again.encode_images(torch.zeros(1, 3, 32, 32)), ["what is it?"])
    start = Tokens(torch.tensor([[again.start_id]]), torch.ones(1, 1, dtype=torch.bool))
    assert again.decode("answer", start, states, mask).isfinite().all()


@pytest.mark.parametrize(("family", "edges", "layers"), [("blip", 226_492_416, 216), ("xvlm", 184_025_088, 168)])
def test_prunable_weights_at_full_size(family, edges, layers):
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    config = {"family": family, "vision": {**width, "image_size": 224, "patch_size": 16}, "text": dict(width)}
    config |= {"fusion_layer": 6} if family == "xvlm" else {}
    config["text"] |= {"vocab_size": 30524, "encoder_hidden_size": 768} if family == "blip" else {"vocab_size": 30522}
    with torch.device("meta"):
        graph = build_model(config, small_model("blip").tokenizer).graph
    assert (graph.n_edges, len(graph)) == (edges, layers)


@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_every_official_name_has_one_of_ours(family, shared):
    names = json.loads((shared / "golden" / f"key_map_{family}.json").read_text())["parameters_and_buffers"]
    for entry in names:
        if entry["kind"] == "parameter" and "_m." not in entry["name"]:
            ours = CHECKPOINTS[family].NAMES.to_ours(entry["name"])
            assert CHECKPOINTS[family].NAMES.to_official(ours) == entry["name"]
            if family == "blip" and entry["transformers"]:
                assert ours == entry["transformers"]


def test_masks_apply_to_a_model_from_anywhere_under_all_names(tmp_path, caplog):
    from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

    model = small_model("blip")
    masks = compute_masks(model, "omp", 0.75)
    save_model(model, tmp_path)
    for cls in (BlipForConditionalGeneration, BlipForQuestionAnswering):
        plain = cls.from_pretrained(tmp_path)
        masks.apply(plain)
        assert ("the model has no text_encoder" in caplog.text) == (cls is BlipForConditionalGeneration)
        caplog.clear()
        for name, parameter in plain.named_parameters():
            layer = model.layer_of(name)
            if name.endswith(".weight") and layer in masks:
                assert torch.equal(parameter != 0, masks[layer] & (model.weight(layer) != 0)), name
    with pytest.raises(ValueError, match="has none of the masks' layers"):
        masks.apply(nn.Linear(2, 2))
    other = Masks({"vision_model.nowhere": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"has no weight vision_model.nowhere.weight"):
        other.apply(model)


def test_a_vocabulary_file_beside_a_checkpoint_gets_blips_tokens(tmp_path):
    model = checkpoint("blip", tmp_path / "m.pth")
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    (tmp_path / "tokenizer.json").unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(len(model.tokenizer) - 7))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    again = load_model(str(tmp_path / "m.pth"))
    assert [again.token_id("[DEC]"), again.token_id("[ENC]")] == [len(pieces), len(pieces) + 1]


def test_a_checkpoint_without_what_tells_its_sizes_is_refused(tmp_path):
    checkpoint("xvlm", tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth", weights_only=True)["model"]
    torch.save({k: v for k, v in state.items() if "crossattention" not in k}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"its sizes cannot be told: .*crossattention"):
        CHECKPOINTS["xvlm"].load_official(tmp_path / "m.pth", heads=(2, 2))
    torch.save({**state, "itm_head.0.bias": torch.zeros(64, dtype=torch.long)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"itm_head.0.bias must hold floating-point weights, got torch.int64"):
        CHECKPOINTS["xvlm"].load_official(tmp_path / "m.pth", heads=(2, 2))


def test_a_blip_fine_tuned_for_vqa_with_unequal_widths(batch):
    small = small_model("blip")
    narrow = {**small.config["vision"], "hidden_size": 16, "intermediate_size": 32}
    text = {**small.config["text"], "encoder_hidden_size": 16}
    config = {**small.config, "vision": narrow, "text": text, "trained_for": "vqa"}
    model = build_model(config, small.tokenizer).eval()
    assert model.get_parameter("text_decoder.bert.encoder.layer.0.crossattention.self.key.weight").shape == (32, 32)
    assert model.pretraining_losses(batch, torch.Generator())["lm"].isfinite()

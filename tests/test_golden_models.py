"""The adapters give what the reference code computes with the same weights (vectors in ../shared/golden)."""

import json

import pytest
import torch
from golden_models import decoder_tokens, official, record, tokens_of
from safetensors.torch import load_file

from vlprune.calibrate.inputs import Inputs
from vlprune.models.attention import additive_mask
from vlprune.models.blip.checkpoint import NAMES
from vlprune.models.fusion import TextStates
from vlprune.models.generation import beam_search
from vlprune.models.images import resize_positions
from vlprune.models.text import Tokens


@pytest.fixture(params=["blip", "xvlm"])
def golden(request, shared, tmp_path):
    """(model with the reference's weights, its batches, its outputs)."""
    model, batches = official(request.param, shared, tmp_path)
    return model, batches, load_file(shared / "golden" / f"forward_{request.param}.safetensors")


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("number", range(3))
def test_outputs_of_pairs(golden, number):
    model, batches, outputs = golden
    key = f"general.{number}"
    tokens = tokens_of(batches, key)
    with torch.no_grad():
        images, hidden = model.encode_images(batches[f"{key}.0"]), model.encode_tokens(tokens)
        fused = model.fuse(TextStates(tokens, hidden), images)
        mask = tokens.attention_mask
        close(images, outputs[f"{key}.image_tokens"], 1e-5)
        close(hidden[mask], outputs[f"{key}.text_tokens"][mask], 1e-5)
        close(model.image_features(images), outputs[f"{key}.image_feat"], 2e-6)
        close(model.text_features(hidden), outputs[f"{key}.text_feat"], 2e-6)
        close(fused[mask], outputs[f"{key}.fusion_tokens_aligned"][mask], 1e-5)
        logits = model.itm_head(fused[:, 0])
        aligned = outputs[f"{key}.itm_logits"].diagonal(dim1=0, dim2=1).t()
        close(logits, aligned, 1e-5 if model.family == "blip" else 1e-6)


def test_losses_with_the_references_negatives(golden, shared):
    model, batches, _ = golden
    losses = json.loads((shared / "golden" / f"forward_{model.family}.json").read_text())["losses"]["general.0"]
    tokens = tokens_of(batches, "general.0")
    n = torch.arange(4)
    with torch.no_grad():
        images, hidden = model.encode_images(batches["general.0.0"]), model.encode_tokens(tokens)
        states = TextStates(tokens, hidden)
        itc = model.itc_loss(model.image_features(images), model.text_features(hidden), torch.eye(4, dtype=torch.bool))
        itm = model.itm_loss(states, images, model.fuse(states, images), ((n + 1) % 4, (n + 2) % 4))
    assert itc.item() == pytest.approx(losses["itc" if model.family == "xvlm" else "itc_inbatch"], abs=1e-5)
    assert itm.item() == pytest.approx(losses["itm_fixed_negatives"], abs=1e-5)


def test_language_model_of_blip(golden):
    model, batches, outputs = golden
    if model.family == "xvlm":
        pytest.skip("X-VLM has no language model loss in pretraining")
    tokens = decoder_tokens(batches, "general.0", model)
    with torch.no_grad():
        logits = model.decode("caption", tokens, model.encode_images(batches["general.0.0"]), None)
        losses = model.sequence_losses(logits, tokens, given=1)
    close(losses, outputs["general.0.lm_loss_per_sequence_sum"], 3e-5)


@pytest.mark.parametrize("number", range(3))
def test_regions_of_xvlm(golden, number):
    """Region tokens by local attention, their fusion, masked words and the box from the whole image."""
    model, batches, outputs = golden
    if model.family == "blip":
        pytest.skip("BLIP has no regions")
    key = f"region.{number}"
    index, inside, texts = batches[f"{key}.1"], batches[f"{key}.7"].bool(), Tokens(*region_texts(batches, key, 2))
    lower, upper = model._split_layers()
    with torch.no_grad():
        whole, hidden = model._recorded_images(batches[f"{key}.0"])
        close(whole, outputs[f"{key}.image_tokens_plain"], 1e-5)
        regions = model.vision_layers(upper, hidden[index], additive_mask(inside))
        regions = model.vision_model.post_layernorm(regions)
        close(regions, outputs[f"{key}.image_tokens"], 1e-5)
        fused = model.fuse(TextStates(texts, model.encode_tokens(texts)), regions, inside)
        close(fused[texts.attention_mask], outputs[f"{key}.fusion_tokens_aligned"][texts.attention_mask], 1e-5)
        masked = Tokens(*region_texts(batches, key, 4))
        states = TextStates(masked, model.encode_tokens(masked))
        logits = model.text_encoder.cls(model.fuse(states, regions, inside))
        close(logits[texts.attention_mask], outputs[f"{key}.mlm_logits_all_positions"][texts.attention_mask], 1e-5)
        grounded = model.fuse(TextStates(texts, model.encode_tokens(texts)), whole[index])
        close(model.bbox_head(grounded[:, 0]).sigmoid(), outputs[f"{key}.bbox_pred"], 1e-5)
    assert len(lower) == 2


def region_texts(batches, key, ids):
    return batches[f"{key}.{ids}"], batches[f"{key}.3"].bool()


def test_calibration_inputs_of_blip(golden, shared):
    """Input squares over the three general and three region batches, as MULTIFLOW sums them."""
    model, batches, _ = golden
    if model.family == "xvlm":
        pytest.skip("the reference's vectors of MULTIFLOW are of BLIP")
    expected = load_file(shared / "golden" / "multiflow_blip.safetensors")
    squares = Inputs(model, list(model.graph), outer=False)
    squares.active = True
    with squares.hooked(), torch.no_grad():
        record(model, batches)
    squares.add()
    compared = 0
    for name, vector in expected.items():
        if name.startswith("sqnorm."):
            layer = model.layer_of(NAMES.to_ours(name.removeprefix("sqnorm.")))
            torch.testing.assert_close(squares.means(layer)["input_sq"], vector, atol=1e-5, rtol=2e-5)
            compared += 1
    assert compared == len(model.graph)


@pytest.mark.parametrize("sizes", [("4to4", 4), ("4to6", 6), ("14to24", 24)])
def test_position_embeddings_of_another_size(shared, sizes):
    stored, (name, side) = load_file(shared / "golden" / "pos_embed.safetensors"), sizes
    resized = resize_positions(stored[f"in.{name}"][0], side)
    for family in ("blip", "xvlm"):
        close(resized, stored[f"{family}.{name}"][0], 1e-6)


def test_image_tokens_at_another_size(golden, shared):
    model, _, _ = golden
    stored = load_file(shared / "golden" / "pos_embed.safetensors")
    model.resize_images(48)
    with torch.no_grad():
        close(model.encode_images(stored["image48"]), stored[f"{model.family}.tokens48"], 1e-5)


@pytest.mark.parametrize("min_length", [5, 12])
def test_beam_search_of_blip(golden, shared, min_length):
    """Every caption that the reference generates from the same weights, with each of several tokens as the end."""
    model, batches, _ = golden
    if model.family == "xvlm":
        pytest.skip("the reference's captions are of BLIP")
    stored = json.loads((shared / "golden" / "downstream_blip.json").read_text())
    if min_length == 5:
        wanted = {int(end): values["beam3"] for end, values in stored["captioning_generated"].items()}
    else:
        wanted = {59: stored["captioning_generated_eos59_min12"]["beam3"]}
    prompt = stored["captioning_prompt"]["used_input_ids"]
    with torch.no_grad():
        images = model.encode_images(torch.cat([batches[f"general.{i}.0"] for i in range(3)]))
    beams = images.repeat_interleave(3, 0)

    def step(ids, cache):
        return model.decode("caption", Tokens(ids, torch.ones_like(ids).bool()), beams, None, cache)[:, -1]

    for end, rows in wanted.items():
        found = beam_search(
            step,
            len(images),
            prompt,
            end=end,
            num_beams=3,
            max_length=20,
            min_length=min_length,
            device=torch.device("cpu"),
        )
        for row, sequence in zip(rows, found, strict=True):
            generated = row[len(prompt) :]
            assert sequence == (generated[: generated.index(end)] if end in generated else generated), end

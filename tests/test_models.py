import copy
from itertools import pairwise

import pytest
import torch
from conftest import CAPTIONS, SMALL, noise_image, small_model

from vlprune.models import MODELS, build_model, load_model, save_model
from vlprune.models.text import clean
from vlprune.models.xvlm.boxes import patches_in


def test_graph_lists_every_linear_weight_outside_the_heads_once(model):
    names = {layer.name for layer in model.graph}
    storages = {model.weight(name).data_ptr() for name in names}
    assert len(storages) == len(names)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight.data_ptr() not in storages:
            assert any(part in name for part in model.excluded), name
    for layer in model.graph:
        assert layer.shape == tuple(model.weight(layer.name).shape)


def test_blip_ties_everything_but_self_attention():
    model = small_model("blip")
    encoder, decoder = model.text_encoder.encoder.layer[1], model.text_decoder.bert.encoder.layer[1]
    assert encoder.attention.self.query.weight is not decoder.attention.self.query.weight
    assert encoder.crossattention.self.query.weight is decoder.crossattention.self.query.weight
    assert encoder.output.dense.weight is decoder.output.dense.weight
    embeddings = model.text_encoder.embeddings.word_embeddings.weight
    assert model.text_decoder.cls.predictions.decoder.weight is embeddings


def test_losses_are_finite_and_every_layer_gets_a_gradient(model, batch):
    losses = model.pretraining_losses(batch, torch.Generator().manual_seed(0))
    assert set(model.scored_losses) <= set(losses)
    sum(losses.values()).backward()
    for layer in model.graph:
        assert model.weight(layer.name).grad.abs().sum() > 0, layer.name


def test_losses_repeat_with_the_same_generator(model, batch):
    a, b = (model.pretraining_losses(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}


@torch.no_grad()
def test_padding_changes_nothing(model):
    images = [noise_image(i) for i in range(2)]
    tokens = model.encode_images(model.pixels(images))
    alone = model.fuse(model.encode_texts(["a dog"]), tokens[:1])
    padded = model.fuse(model.encode_texts(["a dog", CAPTIONS[3]]), tokens)[:1, : alone.shape[1]]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)
    states, mask = model.encode_questions(tokens, ["a dog", CAPTIONS[3]])
    target, _ = model.target_tokens(["yes"])
    short = model.decode("answer", target, model.encode_questions(tokens[:1], ["a dog"])[0], None)
    long = model.decode("answer", target, states[:1], mask[:1])
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("each", [1, 2])
def test_the_first_token_alone_is_that_of_the_whole_fusion(model, each):
    images, captions = [noise_image(i) for i in range(4 // each)], [*CAPTIONS[:3], "a dog"]

    def states_and_gradients(first_states):
        model.zero_grad()
        tokens = model.tokens_of(images)
        states = first_states(model.encode_texts(captions), tokens)
        (states * torch.arange(states.numel()).view_as(states).cos()).sum().backward()
        return states, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, whole = states_and_gradients(lambda texts, t: model.fuse(texts, t.repeat_interleave(each, 0))[:, 0])
    states, gradients = states_and_gradients(model.fuse_first)
    torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_loss_of_retrieval_is_itc_and_itm(model):
    images, texts, ids = [noise_image(i) for i in range(4)], [*CAPTIONS[:3], "a dog"], [0, 1, 2, 3]
    loss = model.retrieval_loss(images, texts, ids, torch.Generator().manual_seed(0))
    tokens, states = model.tokens_of(images), model.encode_texts(texts)
    features = model.image_features(tokens), model.text_features(states.hidden), torch.eye(4, dtype=torch.bool)
    negatives = model.hard_negatives(*features, torch.Generator().manual_seed(0))
    itm = model.itm_loss(states, tokens, model.fuse(states, tokens), negatives)
    torch.testing.assert_close(loss, model.itc_loss(*features) + itm)


@torch.no_grad()
def test_cached_decoding_equals_teacher_forcing(model):
    from transformers import DynamicCache, EncoderDecoderCache

    tokens, _ = model.target_tokens(["a red circle on the beach"])
    images = model.encode_images(model.pixels([noise_image(0)]))
    whole = model.decode("caption", tokens, images, None)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for i in range(tokens.ids.shape[1]):
        step = type(tokens)(tokens.ids[:, i : i + 1], tokens.attention_mask[:, i : i + 1])
        torch.testing.assert_close(
            model.decode("caption", step, images, None, cache)[:, 0], whole[:, i], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_decoder_does_not_see_the_future(model):
    images = model.encode_images(model.pixels([noise_image(0)]))
    a, b = (model.decode("caption", model.target_tokens([text])[0], images, None) for text in ("a dog", "a cat"))
    torch.testing.assert_close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2])


@torch.no_grad()
def test_beam_search_finds_the_likeliest_of_all_short_sequences():
    from vlprune.models.generation import beam_search

    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    best = beam_search(
        lambda ids, _: table[ids[:, -1]].clone(),
        1,
        [5],
        end=0,
        num_beams=200,
        max_length=4,
        min_length=1,
        device=torch.device("cpu"),
    )

    scores = {}
    for length in range(0, 4):
        for sequence in (
            torch.cartesian_prod(*[torch.arange(1, 6)] * length).view(-1, length).tolist() if length else [[]]
        ):
            path = [5, *sequence]
            total = sum(table[a, b].item() for a, b in pairwise(path))
            if length == 3:
                scores[tuple(sequence)] = total / 4
            else:
                scores[tuple(sequence)] = (total + table[path[-1], 0].item()) / len(path)
    assert tuple(best[0]) == max(scores, key=scores.get)


@torch.no_grad()
def test_answers_are_ranked_by_their_sequence_loss(model):
    tokens = model.encode_images(model.pixels([noise_image(0), noise_image(1)]))
    answers = ["yes", "no", "two dogs", "a red ring"]
    scores = model.rank_answers(tokens, ["what?", "is it a dog?"], answers, k=4)
    states, mask = model.encode_questions(tokens, ["what?", "is it a dog?"])
    for j, answer in enumerate(answers):
        target, given = model.target_tokens([answer] * 2)
        losses = model.sequence_losses(model.decode("answer", target, states, mask), target, given)
        torch.testing.assert_close(scores[:, j], -losses, atol=1e-4, rtol=1e-4)
    assert torch.isinf(model.rank_answers(tokens, ["what?", "is it a dog?"], answers, k=1)).sum() == 6


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_task_heads_copy_pruned_layers_under_their_name(model, task):
    graph = model.graph
    model.add_task_head(task)
    assert model.graph is graph
    prunable = {layer.name for layer in graph}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and model.layer_of(name) in prunable:
            torch.testing.assert_close(parameter, model.weight(model.layer_of(name)))


def test_directory_round_trip(model, batch, tmp_path):
    save_model(model, tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    losses = [m.pretraining_losses(batch, torch.Generator().manual_seed(0)) for m in (model, again)]
    assert {k: v.item() for k, v in losses[0].items()} == {k: v.item() for k, v in losses[1].items()}


def test_bad_directories_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'tiny-clip'.*tiny-blip, tiny-xvlm"):
        load_model("tiny-clip")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_model(str(tmp_path))
    models = {family: small_model(family) for family in SMALL}
    for family, model in models.items():
        save_model(model, tmp_path / family)
    weights = tmp_path / "blip" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes((tmp_path / "xvlm" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is of another model"):
        load_model(str(tmp_path / "blip"))
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_model(str(tmp_path / "blip"))
    broken = copy.deepcopy(models["xvlm"])
    with torch.no_grad():
        broken.weight("text_encoder.layer.0.output.dense")[0, 0] = float("nan")
    save_model(broken, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"text_encoder.layer.0.output.dense.weight holds NaN"):
        load_model(str(tmp_path / "nan"))


@pytest.mark.parametrize("name", MODELS)
def test_embedded_models_are_small_and_read_everyday_english(name):
    assert (MODELS[name] / "model.safetensors").stat().st_size <= 10 * 2**20
    model = load_model(name)
    assert 1900 <= len(model.tokenizer) <= 2100
    ids = model.tokenizer("a man riding a horse on the beach", add_special_tokens=False)["input_ids"]
    assert model.tokenizer.unk_token_id not in ids


def test_captions_are_cleaned_as_in_the_reference():
    assert clean("Two  dogs -- one black/white!", 30) == "two dogs one black white"
    assert clean("Is it (really) 5:30 p.m.?   ", 30) == "is it really 530 pm"
    assert clean("one " * 40, 30).split() == ["one"] * 30


def test_patches_in_a_box():
    boxes = torch.tensor([[0.0, 0.0, 0.25, 0.25], [0.3, 0.0, 0.5, 0.2], [0.0, 0.0, 1.0, 1.0]])
    inside = patches_in(boxes, 4).view(3, 4, 4)
    assert inside[0].nonzero().tolist() == [[0, 0]]
    assert inside[1].nonzero().tolist() == [[0, 1], [0, 2], [0, 3]]
    assert inside[2].all()


@pytest.mark.parametrize("family", SMALL)
def test_answering_with_unequal_widths_has_fresh_keys_and_values_that_no_mask_reaches(family):
    narrow = {**SMALL[family]["vision"], "hidden_size": 16, "intermediate_size": 32}
    tokenizer = small_model(family).tokenizer
    text = {**SMALL[family]["text"], "vocab_size": len(tokenizer)}
    text |= {"encoder_hidden_size": 16} if family == "blip" else {}
    model = build_model({**SMALL[family], "vision": narrow, "text": text}, tokenizer).eval()
    masked = {layer.name: layer.shape for layer in model.graph}
    model.add_task_head("vqa")
    loss = model.vqa_loss([noise_image(0)], ["what is it?"], [["a cat"]], [[1.0]])
    assert loss.isfinite()
    fresh = 0
    for name, parameter in model.named_parameters():
        layer = model.layer_of(name)
        if name.endswith(".weight") and layer in masked:
            assert tuple(parameter.shape) == masked[layer], name
        fresh += "crossattention.self.key.weight" in name and layer not in masked
    assert fresh == 2


@pytest.mark.parametrize("family", SMALL)
def test_images_of_another_size(family):
    model = small_model(family)
    before = model.encode_images(model.pixels([noise_image(0)]))
    model.resize_images(32)
    torch.testing.assert_close(model.encode_images(model.pixels([noise_image(0)])), before, atol=0, rtol=0)
    model.resize_images(48)
    assert model.encode_images(model.pixels([noise_image(0)])).shape == (1, 37, 32)
    with pytest.raises(ValueError, match="multiple of the patch size 8, got 50"):
        model.resize_images(50)

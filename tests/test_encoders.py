import json

import pytest
import torch
from conftest import CAPTIONS, noise_image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vlprune.calibrate.collect import collect
from vlprune.models import ZOO, load_model, save_model
from vlprune.models.images import CLIP_MEAN
from vlprune.models.tokenizer import load_tokenizer
from vlprune.models.xvlm import XVLM

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
IMAGES = {"image_size": 32, "patch_size": 8}
KINDS = ("vit", "clip", "clip_vision", "dinov2")


def write_vision(kind, path, **changes):
    """A small random vision encoder on disk, as transformers saves it."""
    torch.manual_seed(1)
    settings = {**WIDTH, **IMAGES, **changes}
    match kind:
        case "vit":
            model = ViTModel(ViTConfig(**settings))
        case "clip_vision":
            model = CLIPVisionModel(CLIPVisionConfig(**settings))
        case "clip":
            model = CLIPModel(CLIPConfig(vision_config=settings, text_config={**WIDTH, "vocab_size": 20}))
        case "dinov2":
            del settings["intermediate_size"]
            model = Dinov2Model(Dinov2Config(**settings))
        case "siglip":
            model = SiglipVisionModel(SiglipVisionConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "position" in name or "cls_token" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model.eval()


def write_text(path, cls=BertModel, config=BertConfig, layers=3, positions=48):
    """A small random text encoder with a tokenizer on disk."""
    torch.manual_seed(2)
    tokenizer = load_tokenizer(ZOO / "tiny-xvlm" / "tokenizer.json")
    settings = {
        **WIDTH,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
        "vocab_size": len(tokenizer),
    }
    model = cls(config(**settings, pad_token_id=0))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request):
    """Each kind of vision encoder in turn."""
    return request.param


@pytest.fixture
def dirs(tmp_path):
    """A DINOv2 and a BERT of three layers."""
    write_vision("dinov2", tmp_path / "vision")
    write_text(tmp_path / "text")
    return tmp_path / "vision", tmp_path / "text"


@torch.no_grad()
def test_image_tokens_are_those_of_the_encoder(kind, tmp_path):
    encoder = write_vision(kind, tmp_path / "vision")
    write_text(tmp_path / "text")
    model = XVLM.from_encoders(tmp_path / "vision", tmp_path / "text", fusion_layers=1)
    pixels = model.pixels([noise_image(i) for i in range(2)])
    if kind == "clip":
        encoder = encoder.vision_model
    wanted = encoder(pixels).last_hidden_state
    if kind.startswith("clip"):
        wanted = encoder.post_layernorm(wanted)
    torch.testing.assert_close(model.encode_images(pixels), wanted)


def test_a_vocabulary_keeps_the_case_that_its_directory_says(dirs):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Dog", "dog"]
    (dirs[1] / "vocab.txt").write_text("\n".join(pieces))
    for path in dirs[1].glob("tokenizer*.json"):
        path.unlink()
    for lower, wanted in ((True, ["dog"]), (False, ["Dog"])):
        (dirs[1] / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        assert XVLM.from_encoders(*dirs, fusion_layers=1).tokenizer.tokenize("Dog") == wanted


def test_a_text_encoder_takes_the_longest_texts(tmp_path):
    write_vision("vit", tmp_path / "vision")
    write_text(tmp_path / "text", positions=32)
    with pytest.raises(ValueError, match=r"the text encoder must take 40 tokens, \S+text takes 32$"):
        XVLM.from_encoders(tmp_path / "vision", tmp_path / "text", fusion_layers=1)


@pytest.mark.parametrize(("fusion", "lower"), [("split", 2), ("top", 3)])
@torch.no_grad()
def test_text_states_are_those_of_bert(tmp_path, fusion, lower):
    write_vision("vit", tmp_path / "vision")
    bert = write_text(tmp_path / "text")
    model = XVLM.from_encoders(tmp_path / "vision", tmp_path / "text", fusion_layers=1, fusion=fusion)
    tokens = model.tokenize(CAPTIONS)
    found = model.encode_tokens(tokens)
    wanted = bert(tokens.ids, attention_mask=tokens.attention_mask.long(), output_hidden_states=True).hidden_states[
        lower
    ]
    torch.testing.assert_close(found[tokens.attention_mask], wanted[tokens.attention_mask])
    assert len(model.text_encoder.layer) == lower + 1
    upper, source = model.text_encoder.layer[-1].state_dict(), bert.encoder.layer[-1].state_dict()
    assert all(torch.equal(upper[name], tensor) for name, tensor in source.items())
    assert {name.split(".")[0] for name in upper.keys() - source.keys()} == {"crossattention"}


def test_head_of_masked_words_comes_from_the_checkpoint_or_is_tied(tmp_path):
    write_vision("vit", tmp_path / "vision")
    bert = write_text(tmp_path / "masked", BertForMaskedLM)
    write_text(tmp_path / "plain")
    for name in ("masked", "plain"):
        model = XVLM.from_encoders(tmp_path / "vision", tmp_path / name, fusion_layers=1)
        embeddings = model.text_encoder.embeddings.word_embeddings.weight
        assert model.text_encoder.cls.predictions.decoder.weight is embeddings
        transform = model.text_encoder.cls.predictions.transform.dense.weight
        same = torch.equal(transform, bert.cls.predictions.transform.dense.weight)
        assert same == (name == "masked")


@pytest.mark.parametrize("fusion", ["split", "top"])
def test_losses_are_finite_and_every_layer_gets_input_and_gradient(kind, tmp_path, batch, fusion):
    write_vision(kind, tmp_path / "vision")
    write_text(tmp_path / "text")
    model = XVLM.from_encoders(tmp_path / "vision", tmp_path / "text", fusion_layers=2, fusion=fusion, embed_dim=16)
    losses = model.pretraining_losses(batch, torch.Generator().manual_seed(0))
    assert all(loss.isfinite() for loss in losses.values())
    found = collect(model, [batch], {"input_sq", "grad"}, 0)
    for layer in model.graph:
        assert found[layer.name]["input_sq"].sum() > 0, layer.name
        assert found[layer.name]["grad"].abs().sum() > 0, layer.name


def test_encoders_of_different_widths_go_together(tmp_path, batch):
    write_vision("vit", tmp_path / "vision", hidden_size=48, intermediate_size=96)
    write_text(tmp_path / "text")
    model = XVLM.from_encoders(tmp_path / "vision", tmp_path / "text", fusion_layers=1)
    assert model.weight("text_encoder.layer.2.crossattention.self.key").shape == (32, 48)
    assert model.captioning_loss(batch.images, batch.texts).isfinite()
    model.add_task_head("vqa")
    assert model.vqa_loss(batch.images, batch.texts, [["a dog"]] * 5, [[1.0]] * 5).isfinite()


def test_a_saved_model_is_the_same_again(kind, tmp_path):
    write_vision(kind, tmp_path / "vision")
    write_text(tmp_path / "text")
    settings = {"embed_dim": 16, "prompt": "", "itc_weight": 3.0}
    model = XVLM.from_encoders(
        tmp_path / "vision", tmp_path / "text", fusion_layers=1, fusion="top", image_size=48, **settings
    )
    save_model(model, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert again.config == model.config
    assert (again.image, again.prompt, again.itc_weight) == (model.image, "", 3.0)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    images = [noise_image(i) for i in range(2)]
    with torch.no_grad():
        for ours, theirs in zip(model.embed_images(images), again.embed_images(images), strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_other_image_sizes_interpolate_the_positions(kind, tmp_path):
    write_vision(kind, tmp_path / "vision")
    write_text(tmp_path / "text")
    same, larger = (
        XVLM.from_encoders(tmp_path / "vision", tmp_path / "text", fusion_layers=1, image_size=size)
        for size in (32, 64)
    )
    assert larger.config["vision"]["image_size"] == larger.image.size == 64
    pictures = [noise_image(0, 64)]
    assert larger.encode_images(larger.pixels(pictures)).shape == (1, 65, 32)
    assert same.encode_images(same.pixels(pictures)).shape == (1, 17, 32)


def test_normalisation_is_that_of_the_directory_or_of_the_family(tmp_path):
    write_text(tmp_path / "text")
    usual = {"vit": ((0.5, 0.5, 0.5), "squash"), "clip": (CLIP_MEAN, "crop"), "dinov2": ((0.485, 0.456, 0.406), "crop")}
    for kind, (mean, fit) in usual.items():
        write_vision(kind, tmp_path / kind)
        model = XVLM.from_encoders(tmp_path / kind, tmp_path / "text", fusion_layers=1)
        assert (model.image.mean, model.image.fit) == (mean, fit)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_center_crop": False}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(said))
    image = XVLM.from_encoders(tmp_path / "clip", tmp_path / "text", fusion_layers=1).image
    assert (image.mean, image.std, image.fit) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")


def test_an_encoder_without_class_token_is_refused(dirs, tmp_path):
    write_vision("siglip", tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"class token .* holds a siglip"):
        XVLM.from_encoders(tmp_path / "siglip", dirs[1], fusion_layers=1)


def test_a_text_encoder_that_is_no_bert_is_refused(dirs, tmp_path):
    write_text(tmp_path / "roberta", RobertaModel, RobertaConfig)
    with pytest.raises(ValueError, match=r"must be a BERT, .* holds a roberta"):
        XVLM.from_encoders(dirs[0], tmp_path / "roberta", fusion_layers=1)


@pytest.mark.parametrize(("fusion", "layers"), [("split", 0), ("split", 3), ("top", 0), ("top", 4)])
def test_too_many_or_no_fusion_layers_are_refused(dirs, fusion, layers):
    with pytest.raises(
        ValueError, match=f"fusion_layers must be from 1 to {2 if fusion == 'split' else 3} .* {layers}"
    ):
        XVLM.from_encoders(*dirs, fusion_layers=layers, fusion=fusion)


def test_unknown_fusion_and_image_sizes_are_refused(dirs):
    with pytest.raises(ValueError, match="fusion must be one of split, top, got 'middle'"):
        XVLM.from_encoders(*dirs, fusion_layers=1, fusion="middle")
    with pytest.raises(ValueError, match="multiple of the patch size 8"):
        XVLM.from_encoders(*dirs, fusion_layers=1, image_size=30)


@torch.no_grad()
def test_real_encoders(shared):
    folder = shared / "weights"
    if not folder.is_dir():
        pytest.skip("needs the real encoders")
    model = XVLM.from_encoders(folder / "vit_s14", folder / "minilm_l6", fusion_layers=2, fusion="top", image_size=98)
    bert = BertModel.from_pretrained(folder / "minilm_l6", dtype=torch.float32).eval()
    tokens = model.tokenize(["a dog runs on the beach", "two people"])
    wanted = bert(tokens.ids, attention_mask=tokens.attention_mask.long()).last_hidden_state
    torch.testing.assert_close(
        model.encode_tokens(tokens)[tokens.attention_mask], wanted[tokens.attention_mask], atol=1e-5, rtol=1e-4
    )
    assert model.encode_images(model.pixels([noise_image(0)])).shape == (1, 50, 384)

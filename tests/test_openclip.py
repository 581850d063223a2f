import json
import subprocess
import sys
from dataclasses import asdict

import open_clip
import pytest
import torch
from conftest import CAPTIONS, noise_image
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file, save_file

import vlprune
from eval import TASKS, get_task
from vlprune.batch import Batch
from vlprune.config import ConfigError
from vlprune.finetune.sparse import KeptSparse
from vlprune.models import family_of, load_model, model_fingerprint, save_model
from vlprune.models.generation import beam_search
from vlprune.models.openclip.adapter import OpenCLIP
from vlprune.models.openclip.checkpoint import CONFIG, WEIGHTS, adapt, build_towers

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
COCA = {
    "embed_dim": 32,
    "vision_cfg": {
        **VISION,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 6,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "context_length": 30, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "context_length": 30},
    "custom_text": True,
}
CONFIGS = {
    "clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "custom": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {**VISION, "ls_init_value": 0.1, "pool_type": "avg"},
        "text_cfg": {**TEXT, "proj_bias": True},
        "custom_text": True,
    },
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "coca": COCA,
    "coca-unpooled": {**COCA, "vision_cfg": {**VISION, "width": 32, "output_tokens": True}},
}
TEXTS = [*CAPTIONS, "a very long text " * 30]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def write_plain(root, name):
    """A directory as open_clip writes it, of a random model that open_clip made by itself."""
    config = json.loads(json.dumps(CONFIGS[name]))
    torch.manual_seed(0)
    custom = config.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Biases begin at zero, some projections uninitialised, and a short text should matter.
            if parameter.ndim < 2 and key != "logit_scale":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if key.endswith(("text_projection", "positional_embedding", "cls_emb")):
                parameter.normal_(std=0.3)
    root.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, root / WEIGHTS)
    stored = {"model_cfg": CONFIGS[name], "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}
    (root / CONFIG).write_text(json.dumps(stored))
    return root


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("open_clip")
    return {name: write_plain(root / name, name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def directory(request, directories):
    return directories[request.param]


@pytest.fixture
def coca(directories):
    return directories["coca"]


def plain_model(directory, **settings):
    model = open_clip.create_model(f"local-dir:{directory}", **settings).eval()
    return model, open_clip.get_tokenizer(f"local-dir:{directory}")


def on_meta(name):
    """A model of a named architecture, without weights."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        return adapt(build_towers(config), config, asdict(PreprocessCfg()))


def batch(n=5, size=40):
    return Batch([noise_image(i, size) for i in range(n)], list(CAPTIONS[:n]))


@torch.no_grad()
def test_outputs_equal_those_of_open_clip(directory):
    model, (plain, tokenizer) = load_model(str(directory)), plain_model(directory)
    images = [noise_image(i) for i in range(3)]
    features, _ = model.embed_images(images)
    torch.testing.assert_close(features, plain.encode_image(model.pixels(images), normalize=True), **TOLERANCE)
    # One text alone has little padding, the long one none.
    for texts in ([CAPTIONS[2]], list(CAPTIONS), TEXTS):
        wanted = plain.encode_text(tokenizer(texts), normalize=True)
        torch.testing.assert_close(model.embed_texts(texts)[0], wanted, **TOLERANCE)


@torch.no_grad()
def test_unpacked_towers_take_the_masks_that_open_clip_passes(directory):
    model, (plain, tokenizer) = load_model(str(directory)), plain_model(directory, force_custom_text=True)
    ids, pixels = tokenizer(TEXTS), model.pixels([noise_image(0)])
    torch.testing.assert_close(model.text(ids), plain.text(ids), **TOLERANCE)
    torch.testing.assert_close(model.visual(pixels), plain.visual(pixels), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["coca", "coca-unpooled"])
def test_decoder_equals_that_of_open_clip(directories, name):
    model, (plain, tokenizer) = load_model(str(directories[name])), plain_model(directories[name])
    images, texts = [noise_image(i) for i in range(len(TEXTS))], TEXTS
    wanted = plain(model.pixels(images), tokenizer(texts))
    loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    itc, lm = loss(
        wanted["image_features"], wanted["text_features"], wanted["logits"], wanted["labels"], plain.logit_scale.exp()
    )
    ours = model.pretraining_losses(Batch(images, texts), torch.Generator())
    torch.testing.assert_close(ours["itc"], itc, **TOLERANCE)
    torch.testing.assert_close(ours["lm"], lm, **TOLERANCE)
    torch.testing.assert_close(model.captioning_loss(images, texts), lm / 2, **TOLERANCE)


@torch.no_grad()
def test_contrastive_loss_is_that_of_open_clip(directories):
    model, (plain, tokenizer) = load_model(str(directories["clip"])), plain_model(directories["clip"])
    pairs = batch()
    wanted = open_clip.ClipLoss()(*plain(model.pixels(pairs.images), tokenizer(pairs.texts)))
    generator = torch.Generator()
    torch.testing.assert_close(model.pretraining_losses(pairs, generator)["itc"], wanted, **TOLERANCE)
    torch.testing.assert_close(
        model.retrieval_loss(pairs.images, pairs.texts, [1, 2, 3, 4, 5], generator), wanted, **TOLERANCE
    )
    # Two captions of one picture: both are right for it.
    same = model.retrieval_loss([pairs.images[0]] * 2, pairs.texts[:2], [1, 1], generator)
    features, texts = model.embed_images(pairs.images[:1])[0], model.embed_texts(pairs.texts[:2])[0]
    logits = model.logit_scale.exp() * features @ texts.t()
    torch.testing.assert_close(same, (torch.log(torch.tensor(2.0)) - logits.log_softmax(1).mean()) / 2, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "vision", "text", "fusion"),
    [
        # 12 blocks of 4 w² + 8 w² weights, w = 768 and 512.
        ("ViT-B-32", (72, 84_934_656), (72, 37_748_736), (0, 0)),
        # The pooler has 2 · 512² + 2 · 512 · 768 more; the decoder's blocks come in pairs.
        ("coca_ViT-B-32", (76, 86_245_376), (72, 37_748_736), (144, 75_497_472)),
        # 3 · 2048² + 1024 · 2048 in the pooling attention; convolutions are not pruned.
        ("RN50", (4, 14_680_064), (72, 37_748_736), (0, 0)),
    ],
)
def test_prunable_counts(name, vision, text, fusion):
    model = on_meta(name)
    found = {"vision": vision, "text": text, "fusion": fusion}
    for modality, (tensors, entries) in found.items():
        layers = [layer for layer in model.graph if layer.modality == modality]
        assert (len(layers), sum(layer.n_edges for layer in layers)) == (tensors, entries), modality
    can = {task for task in TASKS if model.can(get_task(task).needs)}
    assert can == ({"retrieval", "captioning"} if fusion[0] else {"retrieval"})
    assert model.lacks(get_task("vqa").needs) == ("rank_answers", "tokens_of", "vqa_loss")


def test_every_linear_layer_outside_the_projections_is_in_the_graph(directory):
    model = load_model(str(directory))
    names = {layer.name for layer in model.graph}
    for name, module in model.named_modules():
        assert not isinstance(module, torch.nn.MultiheadAttention)
        if isinstance(module, torch.nn.Linear):
            assert (name in names) == (name != "text.text_projection"), name


def test_every_layer_is_reached_and_gets_a_gradient(directory):
    model = load_model(str(directory))
    found = vlprune.collect(model, [batch(), batch(3)], needs={"input_sq", "grad"})
    inputs = vlprune.collect(model, [batch(), batch(3)], needs={"input_sq"})
    for layer in model.graph:
        kinds = found[layer.name]
        assert kinds["input_sq"].shape == layer.shape[1:]
        assert kinds["input_sq"].sum() > 0
        assert kinds["grad"].abs().sum() > 0, layer.name
        torch.testing.assert_close(kinds["input_sq"], inputs[layer.name]["input_sq"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "coca"])
def test_padding_does_not_count(directories, name):
    model, (plain, tokenizer) = load_model(str(directories[name])), plain_model(directories[name])
    pairs = batch()
    found = vlprune.collect(model, [pairs], needs={"input_sq"})["text.transformer.resblocks.0.attn.k_proj"]
    tower = plain.text if name == "coca" else plain
    wanted = torch.zeros(32)
    for ids in tokenizer(pairs.texts):
        real = ids[: int(ids.argmax()) + 1]
        tokens = tower.token_embedding(real) + tower.positional_embedding[: len(real)]
        if name == "coca":
            tokens = torch.cat([tokens, (tower.cls_emb + tower.positional_embedding[-1])[None]])
        wanted += tower.transformer.resblocks[0].ln_1(tokens).square().sum(0)
    torch.testing.assert_close(found["input_sq"], wanted / len(pairs.texts), **TOLERANCE)


@torch.no_grad()
def test_statistics_of_a_text_do_not_depend_on_longer_ones(directory):
    model = load_model(str(directory))
    pictures = [noise_image(0), noise_image(1)]
    together = vlprune.collect(model, [Batch(pictures, [CAPTIONS[2], TEXTS[-1]])], needs={"input_sq"})
    alone = [
        vlprune.collect(model, [Batch([p], [t])], needs={"input_sq"})
        for p, t in zip(pictures, (CAPTIONS[2], TEXTS[-1]))
    ]
    for layer in model.graph:
        sums = [one[layer.name]["input_sq"] for one in alone]
        torch.testing.assert_close(2 * together[layer.name]["input_sq"], sums[0] + sums[1], atol=1e-3, rtol=1e-4)


PLAIN = """
import json, sys
import torch, open_clip
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model = open_clip.create_model(f"local-dir:{directory}").eval()
    again = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    open_clip.load_checkpoint(again, f"{directory}/open_clip_model.safetensors", strict=True)
    given = load_file(f"{directory}/inputs.safetensors")
    with torch.no_grad():
        out = {
            "image": model.encode_image(given["pixels"], normalize=True),
            "text": model.encode_text(given["ids"], normalize=True),
        }
        if hasattr(model, "text_decoder"):
            out["logits"] = model(given["pixels"], given["ids"])["logits"]
    zeros = sum(int((t == 0).sum()) for k, t in model.state_dict().items() if t.ndim > 1)
    save_file({k: t.contiguous() for k, t in out.items()}, f"{directory}/outputs.safetensors", {"zeros": str(zeros)})
    size = model.visual.image_size
    assert (size if isinstance(size, int) else size[0]) == given["pixels"].shape[-1]
assert not any(name.split(".")[0] in ("vlprune", "eval") for name in sys.modules)
"""


def test_pruned_models_load_in_plain_open_clip_with_the_same_outputs_and_sparsity(directories, tmp_path):
    models = {}
    for name, directory in directories.items():
        model = models[name] = load_model(str(directory))
        if name in ("clip", "coca"):
            model.resize_images(48)
        stats = vlprune.collect(model, [batch()], needs={"input_sq"})
        masks = vlprune.compute_masks(model, "multiflow", sparsity=0.75, stats=stats)
        vlprune.apply_masks(model, masks)
        save_model(model, tmp_path / name)
        images = [noise_image(i, 80) for i in range(len(TEXTS))]
        inputs = {"pixels": model.pixels(images), "ids": model.tokenizer(TEXTS)}
        save_file(inputs, tmp_path / name / "inputs.safetensors")
    (tmp_path / "outside").mkdir()
    subprocess.run(
        [sys.executable, "-c", PLAIN, *(str(tmp_path / name) for name in models)], check=True, cwd=tmp_path / "outside"
    )
    for name, model in models.items():
        found = load_file(tmp_path / name / "outputs.safetensors")
        with torch.no_grad():
            pixels = load_file(tmp_path / name / "inputs.safetensors")["pixels"]
            features, tokens = model.encode_images(pixels)
            torch.testing.assert_close(found["image"], features, **TOLERANCE)
            torch.testing.assert_close(found["text"], model.embed_texts(TEXTS)[0], **TOLERANCE)
            if "logits" in found:
                texts = model.tokenize(TEXTS)
                logits = model.text_decoder(tokens, model.text_states(texts)[:, : texts.ids.shape[1] - 1])
                torch.testing.assert_close(found["logits"], logits, **TOLERANCE)
        weights = load_file(tmp_path / name / WEIGHTS)
        zeros = sum(int((w == 0).sum()) for key, w in weights.items() if w.ndim > 1)
        assert abs(zeros - 0.75 * model.graph.n_edges) < 1, name
        again = load_model(str(tmp_path / name))
        assert vlprune.masks.measure(again) == vlprune.masks.measure(model)
        for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0, msg=key)


def test_unpacking_and_packing_gives_the_file_back_bit_by_bit(directory, tmp_path):
    save_model(load_model(str(directory)), tmp_path / "again")
    before, after = (load_file(path / WEIGHTS) for path in (directory, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    stored = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert stored["model_cfg"] == CONFIGS[directory.name]


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "coca"])
def test_images_of_another_size_are_interpolated_as_in_open_clip(directories, name):
    model, (plain, _) = load_model(str(directories[name])), plain_model(directories[name], force_image_size=56)
    model.resize_images(56)
    images = [noise_image(0), noise_image(1)]
    assert model.pixels(images).shape[-1] == 56
    wanted = plain.encode_image(model.pixels(images), normalize=True)
    torch.testing.assert_close(model.embed_images(images)[0], wanted, **TOLERANCE)
    with pytest.raises(ValueError, match="multiple of the patch size 8, got 50"):
        model.resize_images(50)


def test_a_resnet_keeps_its_size(directories):
    model = load_model(str(directories["resnet"]))
    model.resize_images(64)
    with pytest.raises(ValueError, match="takes images of 64 pixels only, got 96"):
        model.resize_images(96)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_those_of_open_clip(directories, tmp_path, mode, interpolation):
    root = tmp_path / "m"
    root.mkdir()
    stored = json.loads((directories["clip"] / CONFIG).read_text())
    stored["preprocess_cfg"] |= {"resize_mode": mode, "interpolation": interpolation}
    (root / CONFIG).write_text(json.dumps(stored))
    (root / WEIGHTS).symlink_to(directories["clip"] / WEIGHTS)
    model = load_model(str(root))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{root}")
    for width, height in ((50, 37), (37, 51), (101, 33), (32, 32), (20, 31), (35, 90)):
        picture = noise_image(width, 120).crop((0, 0, width, height))
        torch.testing.assert_close(model.pixels([picture])[0], transform(picture), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32"])
def test_tokenizers_are_those_of_open_clip(name):
    model = on_meta(name)
    assert torch.equal(model.tokenizer(TEXTS), open_clip.get_tokenizer(name)(TEXTS))


@torch.no_grad()
def test_captions_are_those_of_beam_search_without_cache(coca):
    model, (plain, _) = load_model(str(coca)), plain_model(coca)
    images = [noise_image(0), noise_image(1)]
    start, end = model.tokenizer.sot_token_id, model.tokenizer.eot_token_id
    for beams in (1, 3):
        pixels = model.pixels(images).repeat_interleave(beams, 0)
        latent, embeddings = plain._encode_image(pixels)

        def step(new, cache, pixels=pixels, latent=latent, embeddings=embeddings):
            # The cache carries the ids themselves along, so that they follow their beams.
            ids, _ = cache.self_attention_cache.update(new[:, None, :, None], new[:, None, :, None], 0)
            given = ids[:, 0, :, 0]
            logits = plain(pixels, given, image_latent=latent, image_embs=embeddings, output_labels=False)["logits"]
            return logits[:, -1].index_fill(1, torch.tensor([0]), -torch.inf)

        rows = beam_search(
            step, 2, [start], end=end, num_beams=beams, max_length=9, min_length=4, device=torch.device("cpu")
        )
        wanted = [model.tokenizer.decode([i for i in row if i < start]).strip() for row in rows]
        assert model.generate(images, num_beams=beams, max_length=9, min_length=4) == wanted
        assert any(wanted)
    with pytest.raises(ValueError, match="max_length must be at most 30, got 31"):
        model.generate(images, num_beams=1, max_length=31, min_length=1)


@torch.no_grad()
def test_retrieval_ranks_by_similarity(directory):
    model = load_model(str(directory))
    examples = [{"image": noise_image(i), "image_id": i, "captions": [f"{c} {i}" for c in CAPTIONS]} for i in range(3)]
    task = get_task("retrieval")
    predicted = task.predict(model, examples, task.options(k_test=12), None)
    features = model.embed_images([example["image"] for example in examples])[0]
    texts = model.embed_texts([caption for example in examples for caption in example["captions"]])[0]
    best = (features @ texts.t()).argsort(1, descending=True)[:, :10].tolist()
    for row, order in zip(predicted, best):
        assert row["ranked"] == [[i // len(CAPTIONS), i % len(CAPTIONS)] for i in order]


@pytest.mark.parametrize("name", ["clip", "coca", "resnet"])
def test_a_pruned_model_learns_and_stays_pruned(directories, name):
    model = load_model(str(directories[name]))
    masks = vlprune.compute_masks(model, "omp", sparsity=0.5)
    vlprune.apply_masks(model, masks)
    pairs, generator = batch(), torch.Generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    sparse = KeptSparse(model, masks, model.layer_of)
    for _ in range(8):
        loss = model.retrieval_loss(pairs.images, pairs.texts, range(5), generator)
        if model.can({"captioning_loss"}):
            loss = loss + model.captioning_loss(pairs.images, pairs.texts)
        optimizer.zero_grad()
        loss.backward()
        sparse.mask_gradients()
        optimizer.step()
        sparse.mask_weights()
        losses.append(loss.item())
    assert vlprune.masks.measure(model) == 0.5
    assert losses[-1] < losses[0]


def test_a_checkpoint_file_of_a_named_architecture(tmp_path, monkeypatch, directories):
    config = json.loads((directories["clip"] / CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-clip", config)
    state = load_file(directories["clip"] / WEIGHTS)
    # As open_clip's training writes it.
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": t for k, t in state.items()}}, tmp_path / "epoch_1.pt")
    model = load_model(f"open_clip:small-clip:{tmp_path / 'epoch_1.pt'}")
    wanted = load_model(f"open_clip:{directories['clip']}").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    save_model(model, tmp_path / "saved")
    weights = str(tmp_path / "saved" / WEIGHTS)
    plain, _, _ = open_clip.create_model_and_transforms("small-clip", pretrained=weights)
    assert torch.equal(plain.state_dict()["visual.proj"], state["visual.proj"])


def test_random_weights_are_said_and_always_the_same(monkeypatch, caplog):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-coca", CONFIGS["coca"])
    torch.manual_seed(1)
    first = load_model("open_clip:small-coca")
    assert "open_clip:small-coca names no weights: they are random" in caplog.text
    second = load_model("open_clip:small-coca")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert all(tensor.isfinite().all() for tensor in first.state_dict().values())
    assert model_fingerprint("open_clip:small-coca") == model_fingerprint("open_clip:small-coca")


def test_the_class_of_a_model_is_known_without_building_it(directory):
    assert family_of(str(directory)) is type(load_model(str(directory)))
    assert family_of("open_clip:ViT-B-32") is OpenCLIP


def test_options_are_refused(directories):
    with pytest.raises(ConfigError, match=r"model.options: unknown key 'prompt'"):
        load_model(str(directories["clip"]), {"prompt": "a photo"})


def test_the_fingerprint_depends_on_weights_and_settings(directories, tmp_path):
    one = model_fingerprint(str(directories["clip"]))
    assert one != model_fingerprint(str(directories["coca"]))
    model = load_model(str(directories["clip"]))
    save_model(model, tmp_path / "a")
    with torch.no_grad():
        model.visual.proj[0, 0] += 1
    save_model(model, tmp_path / "b")
    assert model_fingerprint(str(tmp_path / "a")) != model_fingerprint(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("open_clip:ViT-B-31", ValueError, r"unknown model of open_clip 'ViT-B-31'; did you mean 'ViT-B-32'\?"),
        (
            "open_clip:ViT-B-32:laion2b_s34b_b79",
            ValueError,
            r"did you mean 'laion2b_s34b_b79k'\?.*or a checkpoint file",
        ),
        ("open_clip:ViT-B-32:/no/file.pt", FileNotFoundError, "there is no checkpoint file /no/file.pt"),
        ("open_clip:ViT-B-16-SigLIP", ValueError, "a vision tower of timm cannot be pruned"),
        ("open_clip:roberta-ViT-B-32", ValueError, "a text tower of transformers cannot be pruned"),
        ("open_clip:ViT-L-14-CLIPA", ValueError, "a tokenizer of the hub cannot be pruned"),
    ],
)
def test_names_that_are_refused(name, error, message):
    with pytest.raises(error, match=message) as found:
        load_model(name)
    assert "\n" not in str(found.value)


def test_weights_that_cannot_be_fetched_are_never_random(monkeypatch):
    def offline(_):
        raise FileNotFoundError("no\nhub")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"'openai'; give a file: open_clip:ViT-B-32:FILE \(no hub\)"):
        load_model("open_clip:ViT-B-32:openai")


def test_tags_say_their_activation_and_normalisation(monkeypatch, tmp_path, directories):
    fetched = []
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", CONFIGS["clip"])
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda tag: fetched.append(tag) or directories["clip"] / WEIGHTS
    )
    model = load_model("open_clip:ViT-B-32:openai")
    assert fetched[0]["quick_gelu"]
    assert model.config["model_cfg"]["quick_gelu"]
    assert model.image.mean == open_clip.OPENAI_DATASET_MEAN


def test_files_that_are_refused(directories, tmp_path, coca):
    config = (directories["clip"] / CONFIG).read_text()

    def refused(name, message, error=ValueError):
        with pytest.raises(error, match=message) as found:
            load_model(f"open_clip:{tmp_path / name}")
        assert "\n" not in str(found.value)

    (tmp_path / "m").mkdir()
    refused("m", "has no open_clip_config.json", FileNotFoundError)
    (tmp_path / "m" / CONFIG).write_text(config)
    refused("m", "has no weights", FileNotFoundError)
    good = (directories["clip"] / WEIGHTS).read_bytes()
    (tmp_path / "m" / WEIGHTS).write_bytes(good[: len(good) // 2])
    refused("m", "is damaged")
    (tmp_path / "m" / WEIGHTS).write_bytes((coca / WEIGHTS).read_bytes())
    refused("m", "of another model")
    state = load_file(directories["clip"] / WEIGHTS)
    save_file({k: t for k, t in state.items() if k != "visual.proj"}, tmp_path / "m" / WEIGHTS)
    refused("m", r"1 names are missing and 0 unknown, e.g. visual.proj")
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, tmp_path / "m" / WEIGHTS)
    refused("m", "visual.proj holds NaN")
    (tmp_path / "m" / CONFIG).write_text("{")
    refused("m", "is no JSON")
    (tmp_path / "m" / CONFIG).write_text('{"model_cfg": {}}')
    refused("m", "has no 'model_cfg' with 'vision_cfg'")

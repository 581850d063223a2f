"""The reference's tiny models, read from its state dicts as official checkpoints."""

import json

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from vlprune.models.blip import checkpoint as blip_checkpoint
from vlprune.models.fusion import TextStates
from vlprune.models.text import Tokens
from vlprune.models.xvlm import checkpoint as xvlm_checkpoint

CHECKPOINTS = {"blip": blip_checkpoint, "xvlm": xvlm_checkpoint}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": 32,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "[CLS]": 3, "[MASK]": 4}
CONFIGS = {
    "blip": {
        "family": "blip",
        "vision": {**VISION, "patch_size": 8, "layer_norm_eps": 1e-6},
        "text": {
            **TEXT,
            **DROPOUT,
            "num_hidden_layers": 2,
            "vocab_size": 62,
            "encoder_hidden_size": 24,
            "label_smoothing": 0.1,
            "pad_token_id": 0,
            "bos_token_id": 60,
            "sep_token_id": 2,
            "eos_token_id": 2,
        },
        "embed_dim": 16,
    },
    "xvlm": {
        "family": "xvlm",
        "vision": {**VISION, "patch_size": 8},
        "text": {**TEXT, **DROPOUT, "num_hidden_layers": 8, "vocab_size": 60},
        "fusion_layer": 6,
        "local_attn_depth": 1,
        "embed_dim": 16,
    },
}


def official(family, shared, directory):
    """(model of a checkpoint file with a config beside it, the reference's batches)."""
    size = CONFIGS[family]["text"]["vocab_size"]
    named = {**SPECIAL, **({"[DEC]": 60, "[ENC]": 61} if family == "blip" else {})}
    vocabulary = {next((t for t, j in named.items() if j == i), f"w{i}"): i for i in range(size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )
    stored = load_file(shared / "golden" / f"{family}_tiny_model_and_batches.safetensors")
    state = {k.removeprefix("state."): v for k, v in stored.items() if k.startswith("state.")}
    torch.save({"model": state}, directory / "official.pth")
    (directory / "config.json").write_text(json.dumps(CONFIGS[family]))
    model = CHECKPOINTS[family].load_official(directory / "official.pth", tokenizer=tokenizer)
    return model, {k.removeprefix("batch."): v for k, v in stored.items() if k.startswith("batch.")}


def tokens_of(batches, key):
    """The texts of a batch."""
    return Tokens(batches[f"{key}.1"], batches[f"{key}.2"].bool())


def decoder_tokens(batches, key, model):
    """The texts of a batch as the decoder begins them."""
    ids = batches[f"{key}.1"].clone()
    ids[:, 0] = model.start_id
    return Tokens(ids, batches[f"{key}.2"].bool())


def record(model, batches):
    """The recorded passes of BLIP over the three general and three region batches."""
    for number in range(3):
        for kind in ("general", "region"):
            key = f"{kind}.{number}"
            tokens = tokens_of(batches, key)
            with model.recording(image=None):
                images = model.encode_images(batches[f"{key}.0"])
            model._recorded_fusion(TextStates(tokens, torch.empty(0)), images)
            target = decoder_tokens(batches, key, model)
            with model.recording(decoder=target.attention_mask):
                model.decode("caption", target, images, None)

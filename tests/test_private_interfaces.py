"""What is used of transformers and open_clip beyond their documentation is still there; a failure names what is not."""

from inspect import signature

import open_clip
import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn
from transformers import (
    BertConfig,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertOnlyMLMHead
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.utils.hub import cached_file

from vlprune.models.openclip import internals
from vlprune.models.transformers_internals import CACHE
from vlprune.models.xvlm import modeling_xvlm

WIDTH = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
IMAGES = {"image_size": 8, "patch_size": 4}
TEXT = {**WIDTH, "vocab_size": 12, "max_position_embeddings": 8}
CROSS = {"is_decoder": True, "add_cross_attention": True}
COCA = {
    "embed_dim": 8,
    "vision_cfg": {**IMAGES, "layers": 1, "width": 8, "head_width": 4, "output_tokens": True},
    "text_cfg": {
        "context_length": 5,
        "vocab_size": 49408,
        "width": 8,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 5, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def blip_text():
    return BlipTextModel(BlipTextConfig(**TEXT, encoder_hidden_size=8), add_pooling_layer=False)


def blip_vision():
    return BlipVisionModel(BlipVisionConfig(**WIDTH, **IMAGES))


def blip_decoder():
    return BlipTextLMHeadModel(BlipTextConfig(**TEXT, encoder_hidden_size=8))


def clip_vision():
    return CLIPVisionModel(CLIPVisionConfig(**WIDTH, **IMAGES))


def vit():
    return ViTModel(ViTConfig(**WIDTH, **IMAGES), add_pooling_layer=False)


def dinov2():
    return Dinov2Model(Dinov2Config(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, **IMAGES))


def bert_layer():
    return BertLayer(BertConfig(**TEXT, **CROSS), layer_idx=0)


def coca():
    return open_clip.CoCa(**COCA)


ATTRIBUTES = [
    (blip_text, "embeddings.word_embeddings.weight"),
    (blip_text, "encoder.layer.0.attention"),
    (blip_text, "encoder.layer.0.crossattention.self.key"),
    (blip_text, "encoder.layer.0.crossattention.self.value"),
    (blip_text, "encoder.layer.0.crossattention.output"),
    (blip_text, "encoder.layer.0.intermediate"),
    (blip_text, "encoder.layer.0.output"),
    (blip_text, "encoder.layer.0.feed_forward_chunk"),
    (blip_decoder, "bert.embeddings"),
    (blip_decoder, "bert.encoder.layer.0"),
    (blip_decoder, "cls.predictions.decoder.bias"),
    (blip_decoder, "cls.predictions.bias"),
    (blip_vision, "embeddings.position_embedding"),
    (blip_vision, "embeddings.patch_embedding.kernel_size"),
    (blip_vision, "embeddings.num_positions"),
    (clip_vision, "embeddings.position_embedding.weight"),
    (clip_vision, "embeddings.position_ids"),
    (clip_vision, "embeddings.num_positions"),
    (clip_vision, "pre_layrnorm"),
    (clip_vision, "encoder.layers.0"),
    (clip_vision, "post_layernorm"),
    (vit, "embeddings.position_embeddings"),
    (vit, "embeddings.patch_embeddings.num_patches"),
    (dinov2, "embeddings.position_embeddings"),
    (dinov2, "embeddings.patch_embeddings.num_patches"),
    (bert_layer, "add_cross_attention"),
    (bert_layer, "crossattention.self.key"),
    (bert_layer, "crossattention.self.value"),
    (coca, "visual.positional_embedding"),
    (coca, "visual.grid_size"),
    (coca, "visual.image_size"),
    (coca, "visual.patch_size"),
    (coca, "text.attn_mask"),
    (coca, "text.cls_emb"),
    (coca, "text.context_length"),
    (coca, "text.ln_final"),
    (coca, "text.pad_id"),
    (coca, "text.positional_embedding"),
    (coca, "text.text_projection"),
    (coca, "text.token_embedding"),
    (coca, "text.transformer.resblocks.0.attn.in_proj_weight"),
    (coca, "text.transformer.resblocks.0.attn.out_proj"),
    (coca, "text.transformer.resblocks.0.ln_1"),
    (coca, "text.transformer.resblocks.0.ls_1"),
    (coca, "text.transformer.resblocks.0.ln_2"),
    (coca, "text.transformer.resblocks.0.ls_2"),
    (coca, "text.transformer.resblocks.0.mlp"),
    (coca, "text_decoder.resblocks.0"),
    (coca, "text_decoder.cross_attn.0.ln_1_kv"),
    (coca, "text_decoder.ln_final"),
    (coca, "text_decoder.text_projection"),
    (coca, "pad_id"),
    (coca, "logit_scale"),
]


@pytest.mark.parametrize(("made", "path"), ATTRIBUTES, ids=[f"{made.__name__}.{path}" for made, path in ATTRIBUTES])
def test_attribute(made, path):
    found = made()
    for name in path.split("."):
        if name.isdigit():
            found = found[int(name)]
        else:
            assert hasattr(found, name), f"{type(found).__module__}.{type(found).__name__} has no {name} any more"
            found = getattr(found, name)


PARAMETERS = {
    "transformers' BLIP attention": (
        type(blip_text().encoder.layer[0].attention).forward,
        {"attention_mask", CACHE},
    ),
    "transformers' BLIP cross-attention": (
        type(blip_text().encoder.layer[0].crossattention.self).forward,
        {"encoder_hidden_states", "encoder_attention_mask", CACHE},
    ),
    "transformers' BLIP embeddings": (type(blip_text().embeddings).forward, {"input_ids", "position_ids"}),
    "transformers' BERT layer": (
        BertLayer.forward,
        {"attention_mask", "encoder_hidden_states", "encoder_attention_mask", modeling_xvlm.CACHE},
    ),
    "transformers' BERT layer's constructor": (BertLayer.__init__, {"layer_idx"}),
    "transformers' BERT embeddings": (BertEmbeddings.forward, {"input_ids", "position_ids"}),
    "transformers' CLIP layer": (CLIPEncoderLayer.forward, {"attention_mask"}),
    "transformers' cached_file": (cached_file, {"path_or_repo_id", "filename", "kwargs"}),
    "open_clip's resize_pos_embed": (internals.resize_pos_embed, {"state_dict", "model"}),
    "open_clip's attention of a block": (ResidualAttentionBlock.attention, {"q_x", "k_x", "v_x", "attn_mask"}),
    "open_clip's merge_preprocess_dict": (internals.merge_preprocess_dict, {"base", "overlay"}),
    "open_clip's load_checkpoint": (open_clip.load_checkpoint, {"model", "checkpoint_path", "strict", "weights_only"}),
}


@pytest.mark.parametrize("what", PARAMETERS)
def test_parameters(what):
    function, wanted = PARAMETERS[what]
    missing = wanted - set(signature(function).parameters)
    assert not missing, f"{what} has no parameter {', '.join(sorted(missing))} any more"


def test_heads_are_tied_as_here():
    predictions = BertOnlyMLMHead(BertConfig(**TEXT)).predictions
    for name in ("transform", "decoder", "bias"):
        assert hasattr(predictions, name), f"transformers' BERT head has no {name} any more"


def test_a_position_embedding_is_resized_in_the_state():
    tower = VisionTransformer(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_ratio=4)
    internals.resize_vision(tower, 16)
    assert tower.positional_embedding.shape == (17, 8)


def test_the_pooling_attention_of_a_resnet():
    pool = AttentionPool2d(2, 8, 2, 4)
    for name in ("num_heads", "positional_embedding", "k_proj", "q_proj", "v_proj", "c_proj"):
        assert hasattr(pool, name), f"open_clip's AttentionPool2d has no {name} any more"


def test_torch_packs_attention_as_here():
    same, other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert same.in_proj_weight.shape == (24, 8)
    assert other.in_proj_weight is None
    assert torch.is_tensor(other.k_proj_weight)

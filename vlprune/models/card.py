"""The model card of a pruned model: what was done to it, and how it is loaded without this project."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlprune.graph import LayerGraph
from vlprune.masks import Masks, mask_hash, sparsity

LOADING = {
    "blip": """from transformers import AutoImageProcessor, AutoTokenizer, {first}

model = {first}.from_pretrained(DIRECTORY){others}
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
images = AutoImageProcessor.from_pretrained(DIRECTORY, backend="pil")  # the other backend resizes otherwise""",
    "xvlm": """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

# modeling_xvlm.py in this directory needs torch and transformers alone.
model = AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)  # texts are [CLS] pieces, without [SEP]
images = AutoImageProcessor.from_pretrained(DIRECTORY, backend="pil")  # the other backend resizes otherwise""",
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIRECTORY")
tokenizer = open_clip.get_tokenizer("local-dir:DIRECTORY")""",
}
OURS = """import vlprune

# transformers' BlipForQuestionAnswering cannot hold images and texts of different widths.
model = vlprune.load_model(DIRECTORY)"""
BLIP_CLASSES = {
    "retrieval": "BlipForImageTextRetrieval",
    "captioning": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
}
NOTES = {
    "blip": "Texts that look at an image begin with the token [ENC], captions and answers with [DEC], as in BLIP's own "
    "code; transformers leaves that to the caller, and its report names the parts that a class does not use. "
    "Its answer decoder does not see which tokens of a question are padding: ask questions of equal length together.",
    "xvlm": "`model(pixel_values, input_ids, attention_mask)` gives image and text features, fused states and matching "
    "logits.",
    "open_clip": "Query, key and value weights are packed as open_clip holds them.",
}


def card(
    family: str,
    tasks: tuple[str, ...],
    graph: LayerGraph,
    masks: Masks,
    provenance: Mapping[str, str],
) -> str:
    """The README.md of a pruned model's directory, Markdown.

    Args:
        family: of the adapter.
        tasks: of the adapter, those for which transformers has a class that holds it; none: it loads here alone.
        graph: its prunable layers.
        masks: what was kept.
        provenance: where they come from, in the order of the lines.
    """
    groups = {group: [layer.name for layer in graph if layer.modality == group] for group in graph.modality.values()}
    rows = [
        f"| {group} | {len(names)} | {sum(masks[n].numel() for n in names):,} | "
        f"{sum(int(masks[n].sum()) for n in names):,} | {100 * sparsity({n: masks[n] for n in names}):.2f} % |"
        for group, names in (*groups.items(), ("all", list(masks)))
    ]
    classes = [BLIP_CLASSES[task] for task in tasks]
    others = f"  # or {', '.join(classes[1:])}" if classes[1:] else ""
    loading = LOADING[family].replace("{others}", others).replace("{first}", classes[0]) if classes else OURS
    whose = "of open_clip that vlprune has loaded" if family == "open_clip" else "with the same names"
    library = "open_clip" if family == "open_clip" else "transformers"
    done = [f"- {key}: `{value}`" for key, value in provenance.items() if key != "modality"]
    moved = " and new values for the weights that stay" if masks.weights is not None else ""
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "tags: [vlprune, pruning, sparse, image-text]",
            "---",
            "",
            f"# {provenance['model'].rsplit(' ', 1)[0]} pruned to {100 * sparsity(masks):.2f} %",
            "",
            "Pruned weights are exact zeros in dense tensors; nothing was fine-tuned. Its licence is that of the model "
            "it was made from.",
            "",
            "| modality | layers | prunable weights | kept | sparsity |",
            "|---|--:|--:|--:|--:|",
            *rows,
            "",
            "## How it was made",
            "",
            *done,
            f"- torch: `{torch.__version__}`",
            "",
            "## How to load it",
            "",
            "```python",
            loading,
            "```",
            "",
            NOTES[family],
            "",
            f"`masks.safetensors` holds one bit for every prunable weight{moved}, in its header where they come "
            f"from and their sha256, `{mask_hash(masks)}`. `vlprune.load_masks(path).apply(model)` applies them to "
            f"a model {whose}.",
            "",
        ]
    )

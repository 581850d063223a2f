"""The model card of a pruned model: what was done to it, and how it is loaded without this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vlprune import escapes
from vlprune.graph import LayerGraph
from vlprune.masks import Masks, mask_hash, sparsity


@dataclass(frozen=True)
class CardLines:
    """What a family says on the cards of its models.

    Attributes:
        library: the library that loads the model, such as "transformers".
        loading: the lines of Python that load it from DIRECTORY.
        note: what someone who uses it there must know, a paragraph.
        target: what the masks can be applied to, as the end of "a model …".
    """

    library: str
    loading: str
    note: str
    target: str = "with the same names"


def card(lines: CardLines, graph: LayerGraph, masks: Masks, provenance: Mapping[str, str]) -> str:
    """The README.md, in Markdown, of a pruned model's directory.

    Args:
        lines: what the family says.
        graph: the prunable layers.
        masks: the masks that were applied.
        provenance: where they come from, {name: value} in the order of the lines; "model" is the name and the
            fingerprint of the model that was pruned.
    """
    groups = {group: [layer.name for layer in graph if layer.modality == group] for group in graph.modality.values()}
    rows = [
        f"| {group} | {len(names)} | {sum(masks[n].numel() for n in names):,} | "
        f"{sum(int(masks[n].sum()) for n in names):,} | {100 * sparsity({n: masks[n] for n in names}):.2f} % |"
        for group, names in (*groups.items(), ("all", list(masks)))
    ]
    done = [
        f"- {escapes.markdown(key)}: {escapes.markdown_code(value)}"
        for key, value in provenance.items()
        if key != "modality"
    ]
    moved = " and new values for the weights that stay" if masks.weights is not None else ""
    return "\n".join(
        [
            "---",
            f"library_name: {lines.library}",
            "tags: [vlprune, pruning, sparse, image-text]",
            "---",
            "",
            f"# {escapes.markdown(provenance['model'].rsplit(' ', 1)[0])} pruned to {100 * sparsity(masks):.2f} %",
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
            lines.loading,
            "```",
            "",
            lines.note,
            "",
            f"`masks.safetensors` holds one bit for every prunable weight{moved}, in its header where they come "
            f"from and their sha256, `{mask_hash(masks)}`. `vlprune.load_masks(path).apply(model)` applies them to "
            f"a model {lines.target}.",
            "",
        ]
    )

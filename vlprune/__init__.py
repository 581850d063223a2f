"""Task-agnostic pruning of vision-language models: score, prune, fine-tune, evaluate, tabulate."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "vlprune.calibrate.collect": ("collect",),
    "vlprune.config": (
        "CalibrationConfig",
        "FinetuningConfig",
        "ModelConfig",
        "PruningConfig",
        "RunConfig",
        "TaskConfig",
    ),
    "vlprune.execution": ("Execution",),
    "vlprune.data": ("calibration_batches", "load_pairs", "load_questions"),
    "vlprune.graph": ("BipartiteLayer", "LayerGraph"),
    "vlprune.masks": ("Masks", "apply_masks", "overlap"),
    "vlprune.models": ("MODELS", "ModelAdapter", "load_model", "save_model"),
    "vlprune.models.official_masks": ("export_masks", "import_masks"),
    "vlprune.pipeline": ("evaluate", "run"),
    "vlprune.pruners": ("PRUNERS", "Pruner"),
    "vlprune.reports.load": ("load_layers", "load_losses", "load_per_image", "load_results"),
    "vlprune.reports.ranking": ("ranks",),
    "vlprune.reports.significance": ("compare",),
    "vlprune.reports.tables": ("pivot",),
    "vlprune.selection": ("select",),
    "vlprune.stages.masks": ("compute_masks",),
    "vlprune.store.masks": ("load_masks", "save_masks"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A public name, imported when first asked for: a sweep's workers need few of them."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vlprune' has no attribute {name!r}; its public names: {', '.join(__all__)}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__

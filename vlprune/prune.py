"""`python -m vlprune.prune`: prunes a model and writes it as a directory that other libraries load."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from vlprune import cost
from vlprune.batch import Batch
from vlprune.calibrate.collect import Statistics, collect
from vlprune.calibrate.rows import MEMORY_LIMIT, Rows
from vlprune.config import CalibrationConfig, ConfigError, PruningConfig, unknown
from vlprune.data import calibration_batches
from vlprune.masking import compute_masks
from vlprune.masks import Masks, already_sparse, apply_masks
from vlprune.models import ModelAdapter, load_model, model_digest, save_model
from vlprune.models.blip import BLIP
from vlprune.models.card import card
from vlprune.pruners import PRUNERS, check_pruning, get_pruner, prune_masks
from vlprune.store.atomic import write_text
from vlprune.store.masks import save_masks

logger = logging.getLogger(__name__)
MASKS, CARD = "masks.safetensors", "README.md"


@dataclass(frozen=True)
class Options:
    """Prunes a model once and writes it, with its masks and a model card. Lists are separated by commas.

    With several methods or sparsities, OUT gets a directory for each, such as OUT/multiflow-75.

    Attributes:
        model: an embedded model, a directory, an official checkpoint (.pth) or a hub id.
        method: pruning methods.
        sparsity: pruned fractions, in [0, 1).
        out: directory to write, which must not exist or be empty.
        calibration: data set that the methods measure on: an embedded one, a directory or what `datasets` loads.
        n_batches: batches of the one-shot methods.
        batch_size: image-text pairs a batch.
        steps: pruning steps of the methods that measure anew as they go.
        step_batches: fresh batches at each of them.
        alignment: weight of the ITC loss among those whose gradients are taken.
        pattern: N:M, keep N of every M consecutive inputs.
        lam: ridge of chita and chita++.
        seed: of the calibration and of the method's own choices.
        memory_limit: GiB of gradient rows (chita, chita++) in memory; more go to disk.
        spill: directory for gradient rows on disk; OUT's parent where it is not given.
        skip_broken: calibrate on other pairs in the place of images that are missing or cannot be read.
        masks_only: write the masks without the model.
    """

    model: str
    method: str
    sparsity: str
    out: Path
    calibration: str = CalibrationConfig.data
    n_batches: int = CalibrationConfig.n_batches
    batch_size: int = CalibrationConfig.batch_size
    steps: int = CalibrationConfig.steps
    step_batches: int = CalibrationConfig.step_batches
    alignment: float = CalibrationConfig.alignment
    pattern: str | None = None
    lam: float | None = None
    seed: int = 0
    memory_limit: float = MEMORY_LIMIT / 2**30
    spill: Path | None = None
    skip_broken: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    masks_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


class Stages:
    """Seconds and peak memory of what was done, in order."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """A stage while inside."""
        cost.reset_peak()
        start = time.perf_counter()
        yield
        self.rows.append((stage, time.perf_counter() - start, cost.peak()))

    def table(self) -> Table:
        """For the terminal."""
        table = Table(box=None, pad_edge=False)
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        table.add_column("peak memory, GiB", justify="right")
        for stage, seconds, peak in self.rows:
            table.add_row(stage, f"{seconds:.1f}", f"{peak / 2**30:.2f}")
        return table


def prune(options: Options, console: Console) -> Stages:
    """Prunes and writes; returns what it cost.

    Scores are computed once for all sparsities, and one calibration pass serves all one-shot methods.

    Raises:
        ConfigError: an option is wrong; nothing was written.
        ValueError: a model or data that cannot be read, or that a method cannot prune.
        OSError: files that cannot be read or written.
    """
    methods, settings = _settings(options)
    calibration = CalibrationConfig(
        data=options.calibration,
        n_batches=options.n_batches,
        batch_size=options.batch_size,
        steps=options.steps,
        step_batches=options.step_batches,
        alignment=options.alignment,
    )
    several = len(settings) > 1
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out must be a new or an empty directory, there is something in {str(options.out)!r}")
    rows = partial(Rows, options.spill or options.out.absolute().parent, round(options.memory_limit * 2**30))
    stages = Stages()
    with stages("load the model"):
        model = load_model(options.model)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        name = f"{options.model} {model_digest(options.model)}"
    if trap := already_sparse(model):
        logger.warning("%s: %s", options.model, trap)

    def draw(first: int, n_batches: int) -> Iterable[Batch]:
        return calibration_batches(
            calibration.data,
            model,
            n_batches=n_batches,
            batch_size=calibration.batch_size,
            seed=options.seed,
            first=first,
            skip_broken=options.skip_broken,
        )

    once = [get_pruner(method) for method in methods if PRUNERS[method].search is None]
    needs = frozenset().union(*(pruner.needs for pruner in once))
    stats: Statistics = {}
    if needs:
        with stages(f"measure {', '.join(sorted(needs))} on {calibration.n_batches} batches"):
            batches = draw(0, calibration.n_batches)
            stats = collect(model, batches, needs, options.seed, alignment=calibration.alignment, rows=rows())
    dense = {layer.name: model.weight(layer.name).detach().clone() for layer in model.graph}
    for method in methods:
        own = [setting for setting in settings if setting.method == method]
        with stages(f"prune by {method}, {len(own)} sparsit{'ies' if len(own) > 1 else 'y'}"):
            found = _masks(model, dense, own, stats, draw, calibration, options.seed, rows)
        for setting, masks in zip(own, found, strict=True):
            place = options.out / label(setting) if several else options.out
            provenance = {
                "model": name,
                "method": f"{method} ({PRUNERS[method].source})",
                "pruning": repr(setting),
                "seed": str(options.seed),
            }
            if PRUNERS[method].needs or PRUNERS[method].search:
                provenance["calibration"] = repr(calibration)
            if trap:
                provenance["before"] = trap
            with stages(f"write {place}"):
                _write(model, dense, masks, place, provenance, options.masks_only)
            console.print(f"wrote {place}", highlight=False, soft_wrap=True)
    return stages


def label(setting: PruningConfig) -> str:
    """The name of the directory of one of several: method and percent."""
    percent = f"{100 * setting.sparsity:g}"
    return f"{setting.method}-{percent}"


def _settings(options: Options) -> tuple[list[str], list[PruningConfig]]:
    methods = [part.strip() for part in options.method.split(",") if part.strip()]
    for method in methods:
        if method not in PRUNERS:
            raise ConfigError(unknown("method", method, PRUNERS))
    try:
        sparsities = [float(part) for part in options.sparsity.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--sparsity must be numbers separated by commas, got {options.sparsity!r}") from None
    settings = [PruningConfig(method, s, options.pattern, options.lam) for method in methods for s in sparsities]
    if not settings or len(set(settings)) < len(settings):
        raise ConfigError("--method and --sparsity must name each at least one, and none twice")
    try:
        for setting in settings:
            check_pruning(setting)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return methods, settings


def _masks(
    model: ModelAdapter,
    dense: dict[str, Tensor],
    settings: list[PruningConfig],
    stats: Statistics,
    draw: Callable[[int, int], Iterable[Batch]],
    calibration: CalibrationConfig,
    seed: int,
    rows: Callable[[], Rows],
) -> list[Masks]:
    """The masks of one method at each of its sparsities."""
    pruner, pattern = get_pruner(settings[0].method, settings[0].lam), settings[0].pattern
    if pruner.search is None:
        return prune_masks(
            pruner,
            dense,
            stats,
            sparsities=[setting.sparsity for setting in settings],
            modality=model.graph.modality,
            seed=seed,
            pattern=pattern,
        )
    steps, per_step = pruner.search.plan(calibration)
    return [
        compute_masks(
            model,
            pruner.name,
            setting.sparsity,
            batches=lambda step: draw(step * per_step, per_step),
            steps=steps,
            seed=seed,
            lam=setting.lam,
            alignment=calibration.alignment,
            new_rows=rows,
        )
        for setting in settings
    ]


def _write(
    model: ModelAdapter,
    dense: dict[str, Tensor],
    masks: Masks,
    place: Path,
    provenance: dict[str, str],
    masks_only: bool,
) -> None:
    """Writes a directory in full or not at all; the model is dense again afterwards."""
    masks.aliases = model.graph.aliases
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        save_masks(part / MASKS, masks, provenance)
        if not masks_only:
            apply_masks(model, masks)
            save_model(model, part)
            tasks = model.tasks
            if isinstance(model, BLIP) and model.image_width != model.text_width:
                # transformers' answer decoder would read question states with keys as wide as images.
                tasks = tuple(task for task in tasks if task != "vqa")
            write_text(part / CARD, card(model.family, tasks, model.graph, masks, provenance))
        if place.is_dir():
            place.rmdir()
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not masks_only:
            with torch.no_grad():
                for name, weight in dense.items():
                    model.weight(name).copy_(weight)


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    options = tyro.cli(Options, prog="python -m vlprune.prune")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        stages = prune(options, console)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; what was written in full is kept")
    console.print()
    console.print(stages.table())


if __name__ == "__main__":
    main()

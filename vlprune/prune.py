"""`python -m vlprune.prune`: prunes a model and writes it as a directory that other libraries load."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from vlprune import escapes
from vlprune.config import CalibrationConfig, ConfigError, ModelConfig, Options, PruningConfig, RunConfig, unknown
from vlprune.cost import Cost, measured
from vlprune.execution import Execution, gibibytes
from vlprune.masks import Masks, already_sparse, apply_masks
from vlprune.models import ModelAdapter, model_card, save_model
from vlprune.pruners import PRUNERS, check_pruning
from vlprune.stages.fingerprints import Fingerprints
from vlprune.stages.masks import masks_stage
from vlprune.stages.stage import Bench, Stage, obtain
from vlprune.store.atomic import write_text
from vlprune.store.masks import save_masks
from vlprune.sweep.given import parse_values

logger = logging.getLogger(__name__)
MASKS, CARD = "masks.safetensors", "README.md"


@dataclass(frozen=True)
class Arguments:
    """Prunes a model once and writes it, with its masks and a model card. Lists are separated by commas.

    With several methods or sparsities, OUT gets a directory for each, such as OUT/multiflow-75.

    Attributes:
        model: an embedded model, a directory, an official checkpoint (.pth) or a hub id.
        method: pruning methods.
        sparsity: pruned fractions, in [0, 1).
        out: directory to write, which must not exist or be empty.
        calibration: data set that the methods measure on: an embedded one, a directory or what `datasets` loads.
        n_batches: batches of the methods that measure once.
        batch_size: image-text pairs in a batch.
        alignment: weight of the ITC loss among those whose gradients are taken.
        pattern: N:M, keep N of every M consecutive inputs.
        options: settings of a method as NAME=VALUE, such as lam=0.1 of chita; a method that has no such option goes
            without, one of them must have it. May be given several times.
        seed: seeds the draw of the calibration data and the method's own random choices.
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
    alignment: float = CalibrationConfig.alignment
    pattern: str | None = None
    options: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    seed: int = 0
    memory_limit: float = Execution.memory_limit / 2**30
    spill: Path | None = None
    skip_broken: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    masks_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


class Steps:
    """What each step of the work cost, in order."""

    def __init__(self) -> None:
        self.costs: list[tuple[str, Cost]] = []

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """A step while inside."""
        with measured() as cost:
            yield
        self.costs.append((step, cost))

    def table(self) -> Table:
        """The costs as a table for the terminal."""
        table = Table(box=None, pad_edge=False)
        table.add_column("step")
        table.add_column("seconds", justify="right")
        table.add_column("peak memory, GiB", justify="right")
        for step, cost in self.costs:
            table.add_row(Text(escapes.terminal(step)), f"{cost.seconds:.1f}", f"{cost.peak_memory / 2**30:.2f}")
        return table


def prune(arguments: Arguments, console: Console) -> Steps:
    """Prunes and writes; returns what it cost.

    Scores are computed once for all sparsities, and one calibration pass serves all methods that measure once.

    Raises:
        ConfigError: an argument is wrong; nothing was written.
        ValueError: a model or data that cannot be read, or that a method cannot prune.
        OSError: files that cannot be read or written.
    """
    configs = _configs(arguments)
    out, several = arguments.out, len(configs) > 1
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out must be a new or an empty directory, there is something in {str(out)!r}")
    execution = Execution(
        store=None,
        memory_limit=gibibytes(arguments.memory_limit, "--memory-limit"),
        spill=arguments.spill or out.absolute().parent,
        skip_broken=arguments.skip_broken,
    )
    bench, known, steps = Bench(execution), Fingerprints(skip_broken=arguments.skip_broken), Steps()
    with steps("load the model"):
        model = bench.pretrained(configs[0].model)
    if trap := already_sparse(model):
        logger.warning("%s: %s", arguments.model, trap)
    dense = {layer.name: model.weight(layer.name).detach().clone() for layer in model.graph}
    stages = {config: masks_stage(config, known) for config in configs}
    if statistics := {stage.key: stage for own in stages.values() for stage in own.inputs}:
        kinds = ", ".join(dict.fromkeys(stage.member for stage in statistics.values()))
        with steps(f"measure {kinds} on {arguments.n_batches} batches"):
            obtain(list(statistics.values()), bench)
    for method in dict.fromkeys(config.pruning.method for config in configs):
        own = {config: stage for config, stage in stages.items() if config.pruning.method == method}
        with steps(f"prune by {method}, {len(own)} sparsit{'ies' if len(own) > 1 else 'y'}"):
            found = obtain(list(own.values()), bench)
        for (config, stage), masks in zip(own.items(), found, strict=True):
            place = out / label(config.pruning) if several else out
            with steps(f"write {place}"):
                _write(model, dense, masks, place, _provenance(stage, bench, trap), arguments.masks_only)
            del bench.memory[stage.key]
            console.print(escapes.terminal(f"wrote {place}"), highlight=False, markup=False, soft_wrap=True)
    return steps


def label(pruning: PruningConfig) -> str:
    """The name of the directory of one of several: method and percent."""
    return f"{pruning.method}-{round(100 * pruning.sparsity, 6):.10g}"


def _configs(arguments: Arguments) -> list[RunConfig]:
    methods = [part.strip() for part in arguments.method.split(",") if part.strip()]
    for method in methods:
        if method not in PRUNERS:
            raise ConfigError(unknown("method", method, PRUNERS))
    try:
        sparsities = [float(part) for part in arguments.sparsity.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--sparsity must be numbers separated by commas, got {arguments.sparsity!r}") from None
    options = _options(arguments.options, methods)
    calibration = CalibrationConfig(
        data=arguments.calibration,
        n_batches=arguments.n_batches,
        batch_size=arguments.batch_size,
        alignment=arguments.alignment,
    )
    settings = [
        PruningConfig(method, sparsity, arguments.pattern, options[method])
        for method in methods
        for sparsity in sparsities
    ]
    if not settings or len(set(settings)) < len(settings):
        raise ConfigError("--method and --sparsity must name each at least one, and none twice")
    for setting in settings:
        check_pruning(setting)
    if len({label(setting) for setting in settings}) < len(settings):
        raise ConfigError(f"--sparsity must differ by 1e-8 at least, got {arguments.sparsity}")
    model = ModelConfig(arguments.model)
    return [
        RunConfig(model=model, seed=arguments.seed, calibration=calibration, pruning=setting) for setting in settings
    ]


def _options(texts: tuple[str, ...], methods: list[str]) -> dict[str, Options]:
    """{method: its own among the options}."""
    known = {method: [option.name for option in fields(PRUNERS[method].options)] for method in methods}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or len(values := parse_values(value)) != 1:
            raise ConfigError(f"--options takes NAME=VALUE, got {text!r}")
        if not any(name in own for own in known.values()):
            raise ConfigError(unknown("option", name, dict.fromkeys(each for own in known.values() for each in own)))
        given[name] = values[0]
    return {method: Options({name: given[name] for name in own if name in given}) for method, own in known.items()}


def _provenance(stage: Stage[Masks], bench: Bench, trap: str | None) -> dict[str, str]:
    return {**bench.note(stage).facts, **({"before": trap} if trap else {})}


def _write(
    model: ModelAdapter,
    dense: dict[str, Tensor],
    masks: Masks,
    place: Path,
    provenance: dict[str, str],
    masks_only: bool,
) -> None:
    """Writes a directory in full or not at all; the model is dense again afterwards."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        save_masks(part / MASKS, masks, provenance)
        if not masks_only:
            apply_masks(model, masks)
            save_model(model, part)
            write_text(part / CARD, model_card(model, masks, provenance))
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
    arguments = tyro.cli(Arguments, prog="python -m vlprune.prune")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        steps = prune(arguments, console)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print(f"error: {escapes.terminal(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; what was written in full is kept")
    console.print()
    console.print(steps.table())


if __name__ == "__main__":
    main()

"""RunConfig: everything that can change a run's numbers, and nothing else."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

DENSE = "dense"
SCHEDULES = ("linear", "cosine")
AUGMENTATIONS = ("none", "paper")
DECAYED = ("weights", "all")
SELECTIONS = ("last", "best")
PRECISIONS = ("fp32", "bf16")
STEPS = 40  # of fine-tuning, where neither steps nor epochs are given


class ConfigError(ValueError):
    """A setting that cannot be run; the message is one line that says what was wanted, what came and what exists."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest one that is."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{guess} There are: {', '.join(names) or 'none'}"


def _require(holds: bool, what: str, wanted: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{what} must be {wanted}, got {got!r}")


@dataclass(frozen=True)
class CalibrationConfig:
    """What the statistics are measured on.

    Attributes:
        data: name of an embedded data set, a directory, files of one, or an id of the hub.
        n_batches: batches of the one-shot pass.
        batch_size: image-text pairs a batch.
        steps: pruning steps of the iterative methods (itersnip, chita++).
        step_batches: fresh batches at each step of an iterative method.
        alignment: weight of the ITC loss (image-text alignment) among the pretraining losses whose gradients are taken.
    """

    data: str = "scenes"
    n_batches: int = 8
    batch_size: int = 32
    steps: int = 4
    step_batches: int = 4
    alignment: float = 1.0

    def __post_init__(self) -> None:
        for name in ("n_batches", "batch_size", "steps", "step_batches"):
            _require(getattr(self, name) >= 1, f"calibration.{name}", "at least 1", getattr(self, name))
        _require(0 <= self.alignment < math.inf, "calibration.alignment", "finite and at least 0", self.alignment)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of "N:M", keep N of every M consecutive inputs."""
    kept, _, of = pattern.partition(":")
    if not (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
        raise ConfigError(f"a pattern must be N:M with 0 < N < M, such as 2:4, got {pattern!r}")
    return int(kept), int(of)


@dataclass(frozen=True)
class PruningConfig:
    """How much is pruned, and by which method; method "dense" and sparsity 0 leave the model whole.

    Attributes:
        method: a key of PRUNERS, or "dense".
        sparsity: pruned fraction, in [0, 1).
        pattern: "N:M" keeps N of every M consecutive inputs of an output node (2:4, 4:8), for methods that score single
            weights; the sparsity must then be 1 - N / M. None: unstructured.
        lam: ridge λ of chita and chita++; None: the method's default.
    """

    method: str = DENSE
    sparsity: float = 0.0
    pattern: str | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        percent = f" (did you mean {self.sparsity / 100:g}?)" if 1 <= self.sparsity < 100 else ""
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), the pruned fraction, got {self.sparsity:g}{percent}")
        _require(self.method != DENSE or self.sparsity == 0, "the sparsity of the dense model", "0", self.sparsity)
        _require(self.lam is None or 0 < self.lam < math.inf, "pruning.lam", "finite and above 0", self.lam)
        if self.pattern is not None and self.method != DENSE:
            kept, of = parse_pattern(self.pattern)
            wanted = 1 - kept / of
            _require(self.sparsity == wanted, f"the sparsity of pattern {self.pattern}", f"{wanted:g}", self.sparsity)


@dataclass(frozen=True)
class TaskConfig:
    """What is fine-tuned for and evaluated.

    Attributes:
        name: a key of eval.TASKS.
        data: name of an embedded data set, a directory, files of one, or an id of the hub.
        train: split of `data` that is trained on, or several as in "train+val".
        test: split that is evaluated. One without captions or answers is predicted and not scored.
        limit: use only that many samples of each split (None: all).
        image_size: side of the images in fine-tuning and evaluation (None: the model's own, which pruning always uses).
        k_test: candidates that are re-ranked (retrieval by ITM, at least 10 for its recalls; VQA by sequence loss).
        num_beams: beams of caption generation.
        max_length: most tokens of a caption, prompt included.
        min_length: fewest tokens of a caption, prompt included.
    """

    name: str = "retrieval"
    data: str = "scenes"
    train: str = "train"
    test: str = "test"
    limit: int | None = None
    image_size: int | None = None
    k_test: int = 16
    num_beams: int = 3
    max_length: int = 30
    min_length: int = 5

    def __post_init__(self) -> None:
        for name in ("limit", "image_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"task.{name}", "at least 1", value)
        for name in ("k_test", "num_beams", "min_length"):
            _require(getattr(self, name) >= 1, f"task.{name}", "at least 1", getattr(self, name))
        _require(
            self.max_length >= self.min_length,
            "task.max_length",
            f"at least min_length = {self.min_length}",
            self.max_length,
        )


@dataclass(frozen=True)
class FinetuningConfig:
    """Training under the mask: AdamW with a warm-up and a decay, per step.

    Attributes:
        steps: optimizer steps, each image with one of its captions; 0 evaluates the pruned model as it is. STEPS where
            epochs are not given either.
        epochs: instead of steps: times that every caption or question is seen.
        batch_size: samples a step, over all processes.
        device_batch: most samples a forward pass (None: all); the gradients of a step's passes are averaged. The
            negatives of the contrastive and matching losses are those of a pass.
        augment: "none", or "paper" for the random crops, flips and distortions of `vlprune.finetune.augment`.
        lr: peak learning rate.
        weight_decay: of what decayed says.
        decayed: "weights" (none on biases and norms) or "all".
        betas: of AdamW.
        eps: of AdamW.
        schedule: "linear" or "cosine" decay to zero.
        warmup: fraction of the steps with a rising learning rate.
        clip: largest norm of the gradient; 0: whatever it is.
        select: "last", or "best" of the weights after every epoch, by the task's headline metric on the split "val".
        precision: "fp32", or "bf16" for the forward passes of training.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    device_batch: int | None = None
    augment: str = "none"
    lr: float = 5e-4
    weight_decay: float = 0.01
    decayed: str = "weights"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    schedule: str = "linear"
    warmup: float = 0.1
    clip: float = 1.0
    select: str = "last"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", STEPS)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"finetuning takes steps or epochs, got steps = {self.steps} and epochs = {self.epochs}")
        _require(self.steps is None or self.steps >= 0, "finetuning.steps", "at least 0", self.steps)
        for name in ("epochs", "batch_size", "device_batch"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"finetuning.{name}", "at least 1", value)
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"finetuning.{name}", "finite and above 0", value)
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"finetuning.{name}", "finite and at least 0", value)
        _require(all(0 <= beta < 1 for beta in self.betas), "finetuning.betas", "in [0, 1)", self.betas)
        _require(0 <= self.warmup <= 1, "finetuning.warmup", "in [0, 1]", self.warmup)
        choices = {
            "schedule": SCHEDULES,
            "augment": AUGMENTATIONS,
            "decayed": DECAYED,
            "select": SELECTIONS,
            "precision": PRECISIONS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            _require(value in known, f"finetuning.{name}", f"one of {', '.join(known)}", value)
        if self.select == "best" and self.epochs is None:
            raise ConfigError("finetuning.select = 'best' is of the epochs: give finetuning.epochs, not steps")


@dataclass(frozen=True)
class RunConfig:
    """One run, in the order of its stages."""

    model: str = "tiny-xvlm"
    seed: int = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


def plain(value: object) -> str:
    """A setting's value in words, exact: 4 for 4.0."""
    return str(value).removesuffix(".0")


def variant(config: RunConfig) -> str:
    """The settings of calibration and pruning that are not the defaults, as in "alignment=4 lam=0.1"; "" for none.

    Method and sparsity do not count, and a dense run has none. Data counts by its name.
    """
    if config.pruning.method == DENSE:
        return ""
    found = []
    for part in (config.calibration, config.pruning):
        for f in fields(part):
            value, default = getattr(part, f.name), f.default
            if value != default and f.name not in ("method", "sparsity"):
                text = plain(value).rstrip("/")
                found.append(f"{f.name}={text.rpartition('/')[2]}")
    return " ".join(found)


def limited(config: RunConfig, limit: int) -> RunConfig:
    """The same run on `limit` samples of each split, and calibration on no more than about as many pairs.

    A batch of calibration has two pairs at least, as the losses need negatives, and at most half of them, so that there
    are two batches; an iterative method takes a step less rather than a step without a batch.
    """
    task, calibration = config.task, config.calibration
    batch_size = min(calibration.batch_size, max(2, limit // 2))
    n_batches = max(1, limit // batch_size)
    steps = min(calibration.steps, n_batches)
    return replace(
        config,
        task=replace(task, limit=min(task.limit or limit, limit)),
        calibration=replace(
            calibration,
            batch_size=batch_size,
            n_batches=min(calibration.n_batches, n_batches),
            steps=steps,
            step_batches=min(calibration.step_batches, n_batches // steps),
        ),
    )

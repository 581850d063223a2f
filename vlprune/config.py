"""RunConfig: everything that can change a run's numbers, and nothing else; its digest and its cache keys."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

DENSE = "dense"
SCHEDULES = ("linear", "cosine")

T = TypeVar("T")


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
        data: name of an embedded data set or a directory.
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
        data: name of an embedded data set or a directory.
        limit: use only that many samples of each split (None: all).
        k_test: candidates that are re-ranked (retrieval by ITM, at least 10 for its recalls; VQA by sequence loss).
        num_beams: beams of caption generation.
        max_length: most tokens of a caption, prompt included.
        min_length: fewest tokens of a caption, prompt included.
    """

    name: str = "retrieval"
    data: str = "scenes"
    limit: int | None = None
    k_test: int = 16
    num_beams: int = 3
    max_length: int = 30
    min_length: int = 5

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit >= 1, "task.limit", "at least 1", self.limit)
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
        steps: optimizer steps; 0 evaluates the pruned model as it is.
        batch_size: samples a step.
        lr: peak learning rate.
        weight_decay: of weights; none for biases and norms.
        betas: of AdamW.
        schedule: "linear" or "cosine" decay to zero.
        warmup: fraction of the steps with a rising learning rate.
        clip: largest norm of the gradient.
    """

    steps: int = 40
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: str = "linear"
    warmup: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "finetuning.steps", "at least 0", self.steps)
        _require(self.batch_size >= 1, "finetuning.batch_size", "at least 1", self.batch_size)
        _require(0 < self.lr < math.inf, "finetuning.lr", "finite and above 0", self.lr)
        _require(
            0 <= self.weight_decay < math.inf, "finetuning.weight_decay", "finite and at least 0", self.weight_decay
        )
        _require(all(0 <= beta < 1 for beta in self.betas), "finetuning.betas", "in [0, 1)", self.betas)
        _require(self.schedule in SCHEDULES, "finetuning.schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        _require(0 <= self.warmup <= 1, "finetuning.warmup", "in [0, 1]", self.warmup)
        _require(0 < self.clip < math.inf, "finetuning.clip", "finite and above 0", self.clip)


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


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A config dataclass from nested plain values; what is not given keeps its default.

    Args:
        cls: RunConfig or one of its parts.
        values: {field: value}, a part being a mapping of its own.
        where: what an error calls the place the values came from.

    Raises:
        ConfigError: an unknown field, a value of another type, or one out of range.
    """
    arguments = typed(cls, values, where)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def typed(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as the fields of a config dataclass hold them, as in `build`, but their ranges are not looked at."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{where}: {unknown('key', name, known)}")
        arguments[name] = _coerce(value, hints[name], f"{where}.{name}")
    return arguments


def _coerce(value: Any, hint: Any, where: str) -> Any:
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(typing.cast(type, hint), value, where)
        raise ConfigError(f"{where} must be a table, got {value!r}")
    if isinstance(hint, types.UnionType):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if value is None else _coerce(value, inner, where)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_coerce(v, part, where) for v, part in zip(value, parts, strict=True))
        raise ConfigError(f"{where} must be a list of {len(parts)} values, got {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def digest(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as canonical JSON; dataclasses count as their fields."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a digest is made of plain values and dataclasses, got {type(value).__name__}")


@dataclass(frozen=True)
class Contents:
    """What a config only names, so that other weights, photos or code under an old name make other keys.

    Attributes:
        model: digest of the pretrained weights.
        model_code: version of how models are run and trained.
        calibration: digest of the calibration data; empty for the dense run, which reads none.
        statistics_code: version of what calibration measures; 0 for the dense run.
        method_code: version of the pruning method; 0 for the dense run.
        task: digest of the task's data.
        task_code: version of the task.
    """

    model: str
    model_code: int
    calibration: str
    statistics_code: int
    method_code: int
    task: str
    task_code: int


def statistics_key(config: RunConfig, contents: Contents, kind: str) -> str:
    """The cache key of calibration statistics; kind names what was measured and how."""
    return digest("statistics", *_measured(config, contents), kind)


def masks_key(config: RunConfig, contents: Contents) -> str:
    """The cache key of the masks that a config prunes to."""
    return digest("masks", *_measured(config, contents), config.pruning, contents.method_code)


def run_key(config: RunConfig, contents: Contents) -> str:
    """The key of a whole run: everything that changes its numbers. A dense run neither calibrates nor prunes."""
    if config.pruning.method == DENSE:
        config = replace(config, calibration=CalibrationConfig(), pruning=PruningConfig())
    # Data counts by its content and not by its name.
    task, calibration = replace(config.task, data=""), replace(config.calibration, data="")
    return digest("run", replace(config, task=task, calibration=calibration), contents)


def _measured(config: RunConfig, contents: Contents) -> tuple[object, ...]:
    # What the statistics depend on.
    calibration = replace(config.calibration, data=contents.calibration)
    return contents.model, contents.model_code, config.seed, calibration, contents.statistics_code

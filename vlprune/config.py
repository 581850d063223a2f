"""RunConfig: everything that can change a run's numbers, and nothing else."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache, wraps
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from eval.options import AtLeastOne, unknown

DENSE = "dense"
STEPS = 40  # optimizer steps of fine-tuning, where neither steps nor epochs are given

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be run; the message is one line that says what was wanted, what came and what exists."""


# ---- validation ----


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def validated(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked against their types, by pydantic, without conversions.

    Its constructor raises a ConfigError of one line. A whole number is a float, a list is a tuple; nothing else is
    converted. A `__post_init__` may raise further ConfigErrors.
    """
    made: Any = pydantic_dataclass(
        frozen=True, config=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    )(cls)
    init = made.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(_sentence(error, made, "")) from error

    made.__init__ = checked
    return made


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass of `validated`, or one of pydantic's, from nested plain values; what is not given keeps its default.

    Args:
        cls: such as RunConfig, one of its parts, or the options of a method or a task.
        values: {field: value}, a part being a mapping of its own; such as a TOML file or a record holds them.
        where: the place that the values came from, with which an error begins.

    Raises:
        ConfigError: an unknown field, a value of another type, or one out of range.
    """
    return _build(cls, values, f"{where}: " if where else "", "")


@cache
def hints(cls: type) -> dict[str, Any]:
    """{field: type} of a dataclass, without the ranges that annotations give."""
    return get_type_hints(cls)


@cache
def _adapter(cls: type, name: str) -> TypeAdapter:
    return TypeAdapter(get_type_hints(cls, include_extras=True)[name])


def _build(cls: type[T], values: Mapping[str, Any], prefix: str, path: str) -> T:
    kinds = hints(cls)
    ready = {
        name: _build(kinds[name], value, prefix, f"{path}{name}.")
        if is_dataclass(kinds.get(name)) and isinstance(value, Mapping)
        else _tuples(value)
        for name, value in values.items()
    }
    try:
        return cls(**ready)
    except (ConfigError, ValidationError) as error:
        fault = error.__cause__ if isinstance(error, ConfigError) else error
        said = _sentence(fault, cls, path) if isinstance(fault, ValidationError) else str(error)
        raise ConfigError(prefix + said) from None


def check_field(cls: type, name: str, value: Any, where: str) -> None:
    """Refuses a value that a field of a dataclass cannot have, whatever the other fields are.

    Raises:
        ConfigError: a value of another type or out of range; `where` names the place and the field.
    """
    try:
        _adapter(cls, name).validate_python(_tuples(value), strict=True)
    except ValidationError as error:
        raise ConfigError(_sentence(error, cls, where)) from None


def _tuples(values: Any) -> Any:
    """The values with tuples for lists, which is what frozen dataclasses hold."""
    if isinstance(values, Options):
        return values
    if isinstance(values, Mapping):
        return {key: _tuples(value) for key, value in values.items()}
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def _sentence(error: ValidationError, cls: type, path: str) -> str:
    """The first fault of a validation in one line: the field below `path`, what was wanted, what came."""
    fault = error.errors(include_url=False)[0]
    # An index into a tuple says less than the tuple itself.
    names = [str(part) for part in fault["loc"] if isinstance(part, str) and not part.startswith("function-")]
    place = path + ".".join(names)
    if fault["type"] == "unexpected_keyword_argument":
        return (
            f"{path.removesuffix('.')}{': ' if path else ''}{unknown('key', names[-1], [f.name for f in fields(cls)])}"
        )
    if isinstance(raised := fault.get("ctx", {}).get("error"), ValueError):
        return str(raised)
    wanted = fault["msg"].removeprefix("Input should be ")
    if fault["type"] in ("missing", "too_long"):
        wanted = "a list of another length"
    elif fault["type"] in ("dataclass_type", "is_instance_of"):
        wanted = "a table"
    for theirs, ours in (
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
        ("greater than", "above"),
        ("less than", "below"),
    ):
        wanted = wanted.replace(theirs, ours)
    return f"{place} must be {wanted}, got {fault['input']!r}"


class Options(Mapping[str, Any]):
    """Plain values by name, immutable and hashable: what a config holds of the options of a method, task or family.

    Their names, types and ranges are those of the owner's dataclass, which `build` makes of them. Only what differs
    from its defaults needs to be here.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        self._values = {key: _tuples(value) for key, value in sorted({**(values or {}), **more}.items())}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"Options({self._values!r})"


def _options(value: Any) -> Any:
    return Options(value) if isinstance(value, Mapping) else value


GivenOptions = Annotated[Options, BeforeValidator(_options)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["fp32", "tf32", "bf16"]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


# ---- the parts of a run ----


@validated
class ModelConfig:
    """The pretrained model.

    Attributes:
        name: what `load_model` takes: an embedded model, a directory, a checkpoint file or an id of the hub.
        options: settings of the model's family, such as `prompt` of BLIP and X-VLM.
    """

    name: str = "tiny-xvlm"
    options: GivenOptions = field(default_factory=Options)


@validated
class CalibrationConfig:
    """The data that statistics are measured on.

    Attributes:
        data: name of an embedded data set, a directory, annotation files, or an id of the hub.
        n_batches: number of batches that the methods of one shot measure on.
        batch_size: image-text pairs in a batch.
        alignment: weight of the ITC loss (image-text alignment) in the sum of the pretraining losses that the gradient
            methods differentiate.
    """

    data: str = "scenes"
    n_batches: AtLeastOne = 8
    batch_size: AtLeastOne = 32
    alignment: NotNegative = 1.0


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of "N:M", keep N of every M consecutive inputs."""
    found = re.fullmatch("([0-9]{1,6}):([0-9]{1,6})", pattern)
    kept, of = map(int, found.groups()) if found else (0, 0)
    if not 0 < kept < of:
        raise ConfigError(f"a pattern must be N:M with 0 < N < M, such as 2:4, got {reprlib.repr(pattern)}")
    return kept, of


@validated
class PruningConfig:
    """The method and the sparsity; method "dense" with sparsity 0 leaves the model whole.

    Attributes:
        method: a key of PRUNERS, or "dense".
        sparsity: pruned fraction of the prunable weights, in [0, 1).
        pattern: "N:M" keeps N of every M consecutive inputs of an output node (2:4, 4:8), for methods that score single
            weights; the sparsity must then be 1 - N / M. None: unstructured.
        options: settings of the method, such as `lam` of chita.
    """

    method: str = DENSE
    sparsity: float = 0.0
    pattern: str | None = None
    options: GivenOptions = field(default_factory=Options)

    def __post_init__(self) -> None:
        percent = f" (did you mean {self.sparsity / 100:g}?)" if 1 <= self.sparsity < 100 else ""
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), the pruned fraction, got {self.sparsity:g}{percent}")
        if self.method == DENSE and (self.sparsity or self.pattern or self.options):
            raise ConfigError(f"the dense model has no sparsity, pattern or options, got {self}")
        if self.pattern is not None:
            kept, of = parse_pattern(self.pattern)
            if self.sparsity != 1 - kept / of:
                raise ConfigError(
                    f"the sparsity of pattern {self.pattern} must be {1 - kept / of:g}, got {self.sparsity:g}"
                )


@validated
class FinetuningConfig:
    """Training under the mask: AdamW, with a learning rate that rises and then decays step by step.

    Attributes:
        steps: number of optimizer steps, each on `batch_size` images with one of their captions, or on as many
            questions; 0 evaluates the pruned model as it is. Where epochs are not given either, 40.
        epochs: number of times that every caption or question is seen; given instead of steps.
        batch_size: examples in an optimizer step, over all devices.
        device_batch: the most examples in a forward pass (None: all of the step), over all devices where several share
            a run; gradients are accumulated over the passes of a step. The negatives of the contrastive and matching
            losses are those of a pass.
        augment: "none", or "paper" for the random crops, flips and distortions of `finetune.augment`.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled weight decay, applied to the parameters that `decayed` names.
        decayed: "weights" (every parameter but biases and norms) or "all".
        betas: AdamW's β1 and β2.
        eps: AdamW's ε.
        schedule: shape of the decay of the learning rate to zero, "linear" or "cosine".
        warmup: fraction of the steps in which the learning rate rises.
        clip: largest norm of the gradient of a step, to which larger ones are scaled down; 0: no clipping.
        select: which weights are kept: "last", or "best" of those after each epoch, by the task's headline metric on
            the split "val".
        precision: number format of the forward passes of training, "fp32" or "bf16" (autocast).
    """

    steps: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    epochs: AtLeastOne | None = None
    batch_size: AtLeastOne = 32
    device_batch: AtLeastOne | None = None
    augment: Literal["none", "paper"] = "none"
    lr: Positive = 5e-4
    weight_decay: NotNegative = 0.01
    decayed: Literal["weights", "all"] = "weights"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: Positive = 1e-8
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip: NotNegative = 1.0
    select: Literal["last", "best"] = "last"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", STEPS)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"finetuning takes steps or epochs, got steps = {self.steps} and epochs = {self.epochs}")
        if self.select == "best" and self.epochs is None:
            raise ConfigError("finetuning.select = 'best' chooses among epochs: give finetuning.epochs, not steps")


@validated
class TaskConfig:
    """The task that a model is fine-tuned for and evaluated on, with its data.

    Attributes:
        name: a key of eval.TASKS.
        data: name of an embedded data set, a directory, annotation files, or an id of the hub.
        train: split of `data` to train on, or several as in "train+val".
        test: split to evaluate on. One without captions or answers is predicted and not scored.
        limit: number of samples to use of each split (None: all).
        image_size: side of the images in fine-tuning and evaluation, in pixels (None: the model's own, which pruning
            always uses).
        precision: number format of the model's products in evaluation, "fp32", "tf32" (of CUDA devices) or "bf16"
            (autocast).
        extra: metrics that are computed on request only, several as in "meteor+spice", which captioning has (Java).
        options: settings of the task, such as `num_beams` of captioning.
    """

    name: str = "retrieval"
    data: str = "scenes"
    train: str = "train"
    test: str = "test"
    limit: AtLeastOne | None = None
    image_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    precision: Precision = "fp32"
    extra: str = ""
    options: GivenOptions = field(default_factory=Options)


@validated
class RunConfig:
    """One run, in the order of its stages."""

    model: ModelConfig = field(default_factory=ModelConfig)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


PARTS: dict[str, type] = {
    "model": ModelConfig,
    "calibration": CalibrationConfig,
    "pruning": PruningConfig,
    "finetuning": FinetuningConfig,
    "task": TaskConfig,
}


def to_plain(value: Any) -> Any:
    """Nested plain values, as JSON holds them, of a config or a part of one; `build` makes the config of them again."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return list(map(to_plain, value)) if isinstance(value, tuple | list) else value


def changed(config: Any) -> dict[str, Any]:
    """{field: value} of the fields of a config's part that differ from their defaults, options apart."""
    default = _default(type(config))
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name != "options" and getattr(config, f.name) != getattr(default, f.name)
    }


@cache
def _default(cls: type) -> Any:
    return cls()

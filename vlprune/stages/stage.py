"""Stage: one arrow of a run, what it reads and so its key, and how its artifact is made, stored and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from eval import ranks
from vlprune.config import ModelConfig
from vlprune.cost import measured
from vlprune.execution import Execution, never
from vlprune.models import ModelAdapter, load_model
from vlprune.store.artifacts import Note, intact, read_note, write_note, written
from vlprune.store.doing import say
from vlprune.store.keys import digest
from vlprune.store.lease import claimed, clear
from vlprune.store.origin import now, origin
from vlprune.store.remote import Remote, remote_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Made(Generic[T]):
    """An artifact fresh from its maker.

    Attributes:
        value: the artifact.
        facts: what the maker measured beside it; it goes into the note of the artifact.
    """

    value: T
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stage(Generic[T]):
    """A stage of a run.

    Attributes:
        kind: "statistics", "masks", "tuned", "predictions" or "record".
        reads: {name: plain value} of everything that changes the artifact and is no other stage: the settings that the
            stage reads and that differ from their defaults, fingerprints of files, digests of code.
        make: (the stages that are wanted of one pass, the artifacts of their inputs, bench) -> their artifacts, in the
            order of the stages.
        file: (results directory, key) -> the file of the artifact.
        save: (artifact with its facts, file) writes it.
        load: (file, bench) reads it.
        inputs: the stages whose artifacts it is made from, all of one kind.
        member: what tells this stage from those that are made in one pass with it, such as the name of a statistic.
        through_file: whether a fresh artifact is read back from its file before it is used, so that a first and a later
            run see the same values; not for those that are large and exact on disk.
        scratch: suffixes of the files that the maker keeps beside the artifact's, to go on from when it is interrupted;
            they are deleted once the artifact is there.
        beside: suffixes of the files that the maker leaves beside the artifact's, where it leaves any.
        stored: execution -> whether the artifact is worth a file; one without is made again wherever it is needed.
        runs_model: whether making it runs a model, which a GPU is good for.
        joint: whether all ranks (`eval.ranks`) make it together, where there are several; others the first makes alone.
    """

    kind: str
    reads: Mapping[str, Any]
    make: Callable[[Sequence[Stage[T]], Sequence[Any], Bench], Sequence[Made[T]]]
    file: Callable[[Path, str], Path]
    save: Callable[[Made[T], Path], None]
    load: Callable[[Path, Bench], T]
    inputs: tuple[Stage, ...] = ()
    member: str = ""
    through_file: bool = True
    scratch: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    stored: Callable[[Execution], bool] = lambda _: True
    runs_model: bool = True
    joint: bool = False

    @cached_property
    def key(self) -> str:
        """The digest of all that the artifact depends on."""
        return digest(self.made_of)

    @cached_property
    def together(self) -> str:
        """The digest of what the stages of one pass have in common."""
        return digest({**self.made_of, "member": None})

    @property
    def made_of(self) -> dict[str, Any]:
        """What the key is the digest of."""
        return {
            "kind": self.kind,
            "member": self.member,
            "inputs": {stage.key: stage.kind for stage in self.inputs},
            **self.reads,
        }

    def path(self, results: Path) -> Path:
        """The file of the artifact."""
        return self.file(results, self.key)


@dataclass
class Bench:
    """Where the stages of one process are worked on.

    Attributes:
        execution: how and where stages are made.
        memory: {key: artifact}, where there is no store.
        notes: {key: note} of the same.
        models: pretrained models that were loaded, as they were loaded.
        lost: trackers that failed, which are not asked again.
        stopping: whether the process was asked to stop.
        verify: raises an error where what the names in a config stand for has changed since the keys were made; called
            before anything is stored, checkpoints and parts too.
        convene: has the other ranks make the same joint stages at the same time; called before they are made.
    """

    execution: Execution
    stopping: Callable[[], bool] = never
    verify: Callable[[], None] = lambda: None
    convene: Callable[[Sequence[Stage]], None] = lambda _: None
    memory: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    models: dict[ModelConfig, ModelAdapter] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)

    @cached_property
    def remote(self) -> Remote:
        """Where the artifacts of the store are as well."""
        return remote_of(self.execution)

    @property
    def device(self) -> torch.device:
        """The device that models run on."""
        return torch.device(self.execution.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def device_name(self) -> str:
        """The name of the CUDA device that models run on; "" for the processor."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    def pretrained(self, config: ModelConfig) -> ModelAdapter:
        """The pretrained model, in evaluation mode, loaded once; whoever changes it changes it back."""
        if config not in self.models:
            self.models[config] = load_model(config.name, config.options).to(self.device)
        return self.models[config]

    def taken(self, config: ModelConfig) -> ModelAdapter:
        """The pretrained model, in evaluation mode, to be changed: nobody else gets this one."""
        model = self.pretrained(config)
        del self.models[config]
        return model

    def note(self, stage: Stage) -> Note:
        """What is known of an artifact beside its content, also of one whose file is gone.

        Raises:
            KeyError: it was never made here.
        """
        store = self.execution.store
        found = self.notes.get(stage.key) if store is None else read_note(stage.path(store))
        if found is None:
            raise KeyError(f"{stage.kind} {stage.key} was never made here")
        return found


def obtain(stages: Sequence[Stage[T]], bench: Bench) -> list[T]:
    """The artifacts of stages of one kind: loaded, or made and stored first where they are not stored.

    Those that can be made in one pass are. Processes that ask for the same artifacts at the same time wait for the one
    that makes them. A stored file that is not the one its note describes is made again, with a warning. Where there is
    a remote, all that it has is copied from there instead, and what it lacks is copied there.

    Raises:
        OSError: an artifact cannot be stored, for example on a full disk, or may not be read; or the remote fails, and
            what has been made is stored here.
    """
    store, fresh = bench.execution.store, dict[str, T]()
    if store is None:
        for own in _passes(stage for stage in stages if stage.key not in bench.memory):
            bench.memory |= _make(own, bench)
        return [bench.memory[stage.key] for stage in stages]
    lacking = [stage for stage in stages if not _everywhere(stage.path(store), bench.remote)]
    for stage in set(stages) - set(lacking):
        _tidy(stage, store)
    for own in _passes(lacking):
        # Whoever holds a lease waits only for those of earlier kinds of stages, so that nobody waits for himself.
        with claimed((stage.path(store) for stage in own), bench.stopping):
            missing = [stage for stage in own if not _at_hand(stage, store, bench)]
            for stage in missing:
                if stage.path(store).exists():
                    logger.warning("%s is damaged and is made again", stage.path(store))
            fresh |= _make(missing, bench)
    return [fresh[stage.key] if stage.key in fresh else _loaded(stage, store, bench) for stage in stages]


def _tidy(stage: Stage, store: Path) -> None:
    """Deletes what a maker needed to go on from, and its lease; one killed just after it was done has left them."""
    clear(stage.path(store))
    for suffix in stage.scratch:
        stage.path(store).with_suffix(suffix).unlink(missing_ok=True)


def _everywhere(path: Path, remote: Remote) -> bool:
    """Whether an artifact is here, and at the remote too."""
    return intact(path) and remote.has(path)


def _at_hand(stage: Stage, store: Path, bench: Bench) -> bool:
    """Whether an artifact is here, after it was copied from or to the remote, where one of both had it alone."""
    path = stage.path(store)
    if not intact(path):
        return bench.remote.fetch(path)
    if not bench.remote.has(path):
        push(stage, bench)
    return True


def push(stage: Stage, bench: Bench) -> None:
    """Copies an artifact from the store to the remote, with what its maker left beside it.

    Raises:
        OSError: the remote fails.
    """
    remote, store = bench.remote, bench.execution.store
    assert store is not None
    path = stage.path(store)
    for beside in (path.with_suffix(suffix) for suffix in stage.beside):
        if beside.is_file():
            remote.push_file(beside)
    if path.is_file():
        remote.push(path)
    for suffix in stage.scratch:
        remote.remove(path.with_suffix(suffix))


def _loaded(stage: Stage[T], store: Path, bench: Bench) -> T:
    try:
        return stage.load(stage.path(store), bench)
    except FileNotFoundError:  # another sweep needed it no longer, and deleted it just now
        [value] = obtain([stage], bench)
        return value


def _passes(stages: Iterable[Stage[T]]) -> list[list[Stage[T]]]:
    """The stages by the pass that they are made in, each once."""
    found: dict[str, dict[str, Stage[T]]] = {}
    for stage in stages:
        found.setdefault(stage.together, {})[stage.key] = stage
    return [list(own.values()) for own in found.values()]


def _make(stages: Sequence[Stage[T]], bench: Bench) -> dict[str, T]:
    """Makes the stages of one pass and stores them; the artifacts that need not be read back, by key."""
    if not stages:
        return {}
    first, store = stages[0], bench.execution.store
    inputs = obtain(first.inputs, bench) if first.inputs else []
    started = now()
    say(first.kind)
    if first.joint:
        bench.convene(stages)
    with measured() as cost:
        artifacts = first.make(stages, inputs, bench)
    before = [bench.note(stage) for stage in first.inputs]
    origins = {kind: own for note in before for kind, own in note.origins.items()}
    origins[first.kind] = origin(started, bench.device_name, ranks.world() if first.joint else 1)
    costs = _costs(before)
    costs[first.kind] = [round(cost.seconds / len(stages), 3), cost.peak_memory]
    bench.verify()
    fresh = {}
    for stage, made in zip(stages, artifacts, strict=True):
        note = Note(costs=costs, facts=dict(made.facts), made_of=stage.made_of, origins=origins)
        if store is None:
            bench.notes[stage.key] = note
        elif stage.stored(bench.execution):
            with written(stage.path(store), note) as half:
                stage.save(made, half)
        else:
            write_note(stage.path(store), note)
        if store is not None:
            _tidy(stage, store)
            push(stage, bench)
        if store is None or not stage.through_file:
            fresh[stage.key] = made.value
    return fresh


def _costs(notes: Iterable[Note]) -> dict[str, list[float]]:
    """The costs of all inputs together: the sum of their seconds, the largest memory."""
    found: dict[str, list[float]] = {}
    for note in notes:
        for kind, (seconds, memory) in note.costs.items():
            before = found.setdefault(kind, [0.0, 0])
            found[kind] = [round(before[0] + seconds, 3), max(before[1], memory)]
    return found

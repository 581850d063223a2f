"""Trackers: TensorBoard and Weights & Biases show a training while it runs, where that is asked for.

No number depends on them, and what fails in one of them fails no run. Of several ranks, the first alone tracks.
They are not called through accelerate, whose trackers need its PartialState: it would wait for the other ranks where
the first one scores alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from eval import ranks
from vlprune.config import DENSE, RunConfig, to_plain
from vlprune.reports.variants import label, title, variant
from vlprune.stages.masks import settings_read
from vlprune.stages.stage import Bench

logger = logging.getLogger(__name__)

PROJECT = "vlprune"  # of Weights & Biases, where WANDB_PROJECT names none
FINISH = 20.0  # seconds that Weights & Biases has at the end of a training for what it has not sent yet


@dataclass(frozen=True)
class Training:
    """What trackers know of a training.

    Attributes:
        config: the settings of a run that it is part of.
        key: that of the fine-tuned weights.
        store: the results directory.
        goes_on: its next step, counted from 1; what was tracked of that and later ones is replaced. None: none follows.
    """

    config: RunConfig
    key: str
    store: Path
    goes_on: int | None

    @property
    def title(self) -> str:
        """What people call it: "tiny-xvlm omp@75% retrieval seed 0"."""
        model, method = self.config.model, self.config.pruning.method
        named = replace(self.config, model=replace(model, name=model.name.rstrip("/").rpartition("/")[2]))
        reads = frozenset[str]() if method == DENSE else settings_read(method)
        return title(named, label(method, variant(named, reads)))

    @property
    def settings(self) -> dict[str, Any]:
        """{dotted name: value} of its settings."""
        return dict(_flat(to_plain(self.config)))


class Tracker(Protocol):
    """One training as a tracker shows it."""

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Shows values of a step."""
        ...

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Shows what the model that was trained in so many steps is worth."""
        ...

    def close(self) -> None:
        """Stores what is not stored yet."""
        ...


class TensorBoard:
    """Event files in a directory of the training."""

    def __init__(self, training: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

        root = training.store / "tensorboard"
        # Trainings with one key may have several titles, such as two names of one model.
        known = next(root.glob(f"*{training.key}"), None)
        name = re.sub(r"[^A-Za-z0-9_.@%=+-]+", "_", f"{training.title} {training.key}")[-200:]
        self.writer = SummaryWriter(str(known or root / name), purge_step=training.goes_on)
        if known is None:
            lines = [f"    {name} = {value}" for name, value in training.settings.items()]
            self.writer.add_text("settings", "\n".join(lines))

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Adds points to the curves."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a training that is killed goes on from its checkpoint, which may be the next thing

    metrics = step

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases, whose id is the key."""

    def __init__(self, training: Training) -> None:
        import wandb  # an extra  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(training.store)),
            id=training.key,
            name=training.title,
            config=training.settings,
            resume="allow",
            reinit="create_new",  # rather than a run that failed to end
            # The output of a worker has its own log, and one that is asked to stop has little time.
            settings=wandb.Settings(console="off", finish_timeout=FINISH, finish_timeout_raises=True),
        )

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Adds points to the curves; W&B ignores those of steps that it has."""
        self.run.log(dict(values), step=step)

    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        """Adds to the summary, which has no steps."""
        self.run.summary.update(dict(values))

    def close(self) -> None:
        """Sends the rest."""
        self.run.finish()


TRACKERS: dict[str, Callable[[Training], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """The trackers of one training that are asked for; one that fails is let go with a warning.

    Args:
        config: the settings of a run that the training is part of.
        key: that of the fine-tuned weights.
        bench: where it is worked on.
        goes_on: as in `Training`.
    """

    def __init__(self, config: RunConfig, key: str, bench: Bench, *, goes_on: int | None) -> None:
        self._bench = bench
        self._trackers: dict[str, Tracker] = {}
        if (store := bench.execution.store) is None or ranks.rank():
            return
        for name in bench.execution.track:
            if name not in bench.lost:
                with self._forgiven(name):
                    self._trackers[name] = TRACKERS[name](Training(config, key, store, goes_on))

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Shows values of a step, counted from 1."""
        self._each(lambda tracker: tracker.step(values, step))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Shows what the model that was trained in so many steps is worth."""
        self._each(lambda tracker: tracker.metrics(values, step))

    def close(self) -> None:
        """Stores what is not stored yet."""
        for name, tracker in self._trackers.items():
            with self._forgiven(name):
                tracker.close()

    def _each(self, show: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            if name not in self._bench.lost:
                with self._forgiven(name):
                    show(tracker)

    @contextmanager
    def _forgiven(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the run can do without
            if name not in self._bench.lost:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("tracking with %s failed, and the run goes on without: %s", name, reason)
            self._bench.lost.add(name)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the values in nested mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value

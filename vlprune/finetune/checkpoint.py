"""Checkpoints of fine-tuning: what it needs to go on after its process was killed, to bit-identical weights."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval import ranks
from vlprune.execution import Interrupted, never
from vlprune.store.artifacts import Note, intact, written
from vlprune.store.remote import NOWHERE, Remote, RemoteError

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """A file that holds the state of fine-tuning every few minutes, and when the process is asked to stop.

    Attributes:
        path: the file.
        seconds: time between two checkpoints.
        stopping: whether the process was asked to stop.
        verify: raises an error where the model or the data are not those that training began with; called before the
            state is stored.
        remote: where the file is as well, for another machine to go on from.
    """

    path: Path
    seconds: float
    stopping: Callable[[], bool] = never
    verify: Callable[[], None] = lambda: None
    remote: Remote = NOWHERE
    _last: float = field(default_factory=time.monotonic)

    def read(self) -> dict[str, Any] | None:
        """The state that was stored last, at the remote where it has one; None where there is none that can be read."""
        if not ranks.rank():
            self.remote.fetch(self.path)
        ranks.told(None)  # the others read what the first has fetched
        if not self.path.exists():
            return None
        try:
            if intact(self.path):
                return torch.load(self.path, weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read: %s", self.path, error)
        logger.warning("%s is damaged; fine-tuning begins anew", self.path)
        return None

    def after_step(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Stores the state where it is time to; of several ranks, the first alone does.

        Raises:
            Interrupted: the process, or that of another rank, was asked to stop; the state is stored.
        """
        said = ranks.listed([(self.stopping(), time.monotonic() - self._last >= self.seconds)])
        stopping, due = any(asked for asked, _ in said), said[0][1]
        if not stopping and not due:
            return
        if not ranks.rank():
            self.verify()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written(self.path, Note()) as half:
                torch.save(dict(state()), half)
            self._push()
        self._last = time.monotonic()
        if stopping:
            raise Interrupted(f"fine-tuning stopped; it goes on from {self.path}")

    def _push(self) -> None:
        try:
            self.remote.push(self.path)
        except RemoteError as error:  # training need not wait for it: this machine can go on from its own
            logger.warning("a checkpoint of fine-tuning is on this machine alone: %s", error)

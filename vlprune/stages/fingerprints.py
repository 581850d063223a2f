"""What the names in a config stand for at present: contents of files, and the code behind a method, task or family."""

from __future__ import annotations

from functools import cache
from typing import Any

from eval.base import Task
from vlprune import models
from vlprune.config import ModelConfig, RunConfig, TaskConfig, build, changed
from vlprune.data import READERS_VERSION, left_out, left_out_of_calibration, load_answers, take_data_fingerprint
from vlprune.models import family_of, take_model_fingerprint
from vlprune.models.registry import get_family
from vlprune.pruners import PRUNERS
from vlprune.selection import VERSION as SELECTION_VERSION
from vlprune.store.code import code_digest
from vlprune.store.keys import digest


class Fingerprints:
    """Fingerprints by name; each file is looked at once in the life of this object.

    Args:
        skip_broken: whether images that cannot be read are left out, so that which ones they are counts as well.
    """

    def __init__(self, *, skip_broken: bool = False) -> None:
        self.skip_broken = skip_broken
        # What the files of a name look like, with which a change shows even if their contents are as before again.
        self.listings: dict[str, str] = {}
        self.paths: set[str] = set()  # those files, and the folders that hold them
        self.settings: dict[RunConfig, str] = {}  # {unpruned run: the key of its predictions}
        self._files, self._data = cache(self._look_at_model), cache(self._look_at_data)
        self._left_out, self._answers = cache(left_out), cache(self._look_at_answers)
        self._model = cache(self._look_at_family)

    def _look_at_model(self, name: str) -> str:
        found = take_model_fingerprint(name)
        self.listings[f"model {name}"] = found.listing
        self.paths |= set(found.paths)
        return found.contents

    def _look_at_data(self, name: str) -> str:
        found = take_data_fingerprint(name)
        self.listings[f"data {name}"] = found.listing
        self.paths |= set(found.paths)
        return found.contents

    def _look_at_answers(self, name: str) -> str | None:
        listed = load_answers(name)
        return None if listed is None else digest(listed)

    def _look_at_family(self, config: ModelConfig) -> dict[str, Any]:
        adapter = family_of(config.name)
        code = [models.VERSION, code_digest(adapter, get_family(adapter.family).load, options=adapter.options)]
        options = changed(build(adapter.options, config.options, "model.options"))
        return {"files": self.model_files(config.name), "code": code, **({"options": options} if options else {})}

    def model_files(self, name: str) -> str:
        """Of the files of a pretrained model."""
        return self._files(name)

    def model(self, config: ModelConfig) -> dict[str, Any]:
        """Of a pretrained model: its files, its family's code, the options that were given."""
        return self._model(config)

    def data(self, name: str) -> list[Any]:
        """Of a data set: its files, and the version of what reads them."""
        return [self._data(name), READERS_VERSION]

    def left_out(self, task: TaskConfig, kind: str, split: str) -> list[str]:
        """The images of a split that are left out, with the reasons; none unless broken ones are to be skipped."""
        return self._left_out(task.data, kind, split, task.limit) if self.skip_broken else []

    def left_out_of_calibration(self, config: RunConfig, n_batches: int) -> list[str]:
        """The images that the first batches of a run's calibration have others for; none unless that is asked for."""
        own = config.calibration
        if not self.skip_broken:
            return []
        return left_out_of_calibration(own.data, n_batches=n_batches, batch_size=own.batch_size, seed=config.seed)

    def prepared(self, config: TaskConfig, task: Task) -> dict[str, Any]:
        """Of what a task prepares to predict: its training examples, or the answers that the data comes with."""
        listed = self._answers(config.data) if task.examples == "questions" else None
        return self.split(config, task.examples, config.train) if listed is None else {"answers": listed}

    def split(self, task: TaskConfig, kind: str, split: str) -> dict[str, Any]:
        """Of the examples of a split of a task's data."""
        missing = self.left_out(task, kind, split)
        limit = {} if task.limit is None else {"limit": task.limit}
        return {"data": self.data(task.data), "split": split, **limit, **({"left_out": missing} if missing else {})}


def pruner_code(name: str) -> list[Any]:
    """What of a method's code decides its masks: the digest of its functions, and who competes with whom."""
    pruner = PRUNERS[name]
    return [code_digest(*pruner.code, options=pruner.options), pruner.within, SELECTION_VERSION]


def training_code(task: Task) -> str:
    """The digest of the code that a task trains with."""
    return code_digest(task.loss)


def prediction_code(task: Task) -> str:
    """The digest of the code that a task predicts with."""
    return code_digest(*filter(None, (task.prepare, task.predict)), options=task.options)


def score_code(task: Task) -> str:
    """The digest of the code that a task scores predictions with."""
    return code_digest(task.score, task.floors, *([] if task.per_image is None else [task.per_image]))

"""A table of results as plain values: its cells, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlprune.config import RunConfig
from vlprune.reports.variants import title

Place = tuple[str, str, str, float, str, int]


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        config: the settings of the run.
        variant: the settings that tell it from other runs of its method, as in "alignment=4 lam=0.1".
        label: how the table calls its method, with the settings that tell its variants apart.
        where: the entry of the file that it comes from.
    """

    config: RunConfig
    variant: str
    label: str
    where: str

    @property
    def row(self) -> tuple[str, str, str, float]:
        """(model, method, variant, sparsity)."""
        pruning = self.config.pruning
        return self.config.model.name, pruning.method, self.variant, pruning.sparsity

    @property
    def place(self) -> Place:
        """(model, method, variant, sparsity, task, seed): where its numbers stand in the table."""
        return *self.row, self.config.task.name, self.config.seed

    def __str__(self) -> str:
        return title(self.config, self.label)


@dataclass(frozen=True)
class Table:
    """A named set of cells, in the order of the file, each place once.

    Attributes:
        name: name of the table, which its files are called by.
        cells: the cells.
        headlines: {task: the metric that the table shows first}.
        defaults: {method: {option: its default in words}} of the methods in the table that have options.
    """

    name: str
    cells: tuple[Cell, ...]
    headlines: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, str]]

    def named(self, name: str) -> Table:
        """The same table under another name."""
        return replace(self, name=name)

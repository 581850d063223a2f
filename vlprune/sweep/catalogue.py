"""What exists to choose from: models, methods, tasks, data sets, and the table that runs by default."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from vlprune.config import ConfigError
from vlprune.sweep.table import Catalogue

QUICKSTART = Path("experiments") / "quickstart.toml"


def catalogue() -> Catalogue:
    """The names that a table may use; importing them takes seconds."""
    from eval import TASKS
    from vlprune.calibrate.collect import UNCACHED
    from vlprune.contents import contents
    from vlprune.data import data_digest
    from vlprune.models import model_digest
    from vlprune.pruners import PRUNERS, check_pruning

    return Catalogue(
        # A search measures its own statistics as it goes, and rows are never shared.
        methods={name: frozenset() if pruner.search else pruner.needs - UNCACHED for name, pruner in PRUNERS.items()},
        tasks=tuple(TASKS),
        headlines={name: task.headline for name, task in TASKS.items()},
        check=check_pruning,
        # The cells of a table share their models and data.
        contents=partial(contents, of_model=cache(model_digest), of_data=cache(data_digest)),
    )


def quickstart() -> Path:
    """The quickstart's TOML file: of the working directory, else of the clone that this package is in.

    Raises:
        ConfigError: it is in neither.
    """
    for root in (Path(), Path(__file__).resolve().parents[1]):
        if (root / QUICKSTART).is_file():
            return root / QUICKSTART
    raise ConfigError(f"there is no {QUICKSTART} here; run this in a clone of vlprune, or name a TABLE.toml")

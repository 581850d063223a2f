"""What runs of one table were made with, where that is not the same for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vlprune.store.record import Record


def mixture(records: Iterable[Record]) -> str:
    """One sentence on what runs were not all made with alike: versions, processors, commits; "" where all were.

    Example:
        "Not all 114 runs were made alike: torch 2.14.1 (90 runs), 2.15.0 (24 runs)."
    """
    records = list(records)
    runs: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for what, value in _made_with(record):
            runs.setdefault(what, {}).setdefault(value, set()).add(record.key)
    mixed = [
        f"{what} " + ", ".join(f"{value} ({_runs(len(keys))})" for value, keys in values.items())
        for what, values in runs.items()
        if len(values) > 1
    ]
    return f"Not all {len(records)} runs were made alike: {'; '.join(mixed)}." if mixed else ""


def _runs(number: int) -> str:
    return f"{number} run" if number == 1 else f"{number} runs"


def _made_with(record: Record) -> Iterator[tuple[str, str]]:
    for origin in record.origins.values():
        yield "device", origin["device"]
        if origin["commit"]:
            yield "commit", f"{origin['commit'][:10]}{'-dirty' if origin['commit'].endswith('-dirty') else ''}"
        yield from origin["versions"].items()

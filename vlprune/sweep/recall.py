"""What a sweep planned before: the table of a finished sweep is printed without looking at models and data again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import eval as tasks
from vlprune.config import ConfigError
from vlprune.store.atomic import write_text
from vlprune.store.identity import Identity, identities, settled
from vlprune.store.keys import digest
from vlprune.store.manifest import Manifest, parse_manifest
from vlprune.sweep.options import Options, quickstart

# Options that decide which runs a table has.
DECIDE = ("data", "models", "methods", "sparsities", "tasks", "seeds", "set", "limit", "skip_broken")
PACKAGES = (Path(__file__).parents[1], Path(tasks.__file__).parent)


def look(options: Options) -> dict[str, Identity]:
    """What the table and the code look like, before anything is planned from them.

    Raises:
        ConfigError: there is no table.
    """
    table = options.table or quickstart()
    code = [
        path
        for package in PACKAGES
        for folder, _, names in os.walk(package)
        if not folder.endswith("__pycache__")
        for path in (folder, *(os.path.join(folder, name) for name in names))
    ]
    try:
        return identities([str(table), *code])
    except OSError:  # the planner says what is wrong with it
        return {}


def remember(options: Options, own: Mapping[str, Identity], files: Mapping[str, Identity], manifest: Manifest) -> None:
    """Stores what a sweep planned.

    Args:
        options: the options of the command line.
        own: what `look` returned before.
        files: what the files of models and data looked like that it was planned from; none where it may change without
            them.
        manifest: what was planned.
    """
    if not own or not files or not settled(own):
        return
    values = {"paths": sorted(files), "looks": _digest({**own, **files}), "manifest": asdict(manifest)}
    with suppress(OSError):  # the next sweep takes longer
        write_text(_path(options), json.dumps(values))


def recall(options: Options, own: Mapping[str, Identity]) -> Manifest | None:
    """What the same sweep planned before; None where it is not known, or a file has changed since.

    Args:
        options: the options of the command line.
        own: what `look` returned.
    """
    path = _path(options)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        same = values["looks"] == _digest({**own, **identities(values["paths"])})
        return parse_manifest(json.dumps(values["manifest"]), path) if same else None
    except (OSError, ValueError, KeyError, TypeError, ConfigError):  # not stored, damaged, or files are gone
        return None


def _digest(found: Mapping[str, Identity]) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _path(options: Options) -> Path:
    decided = {name: str(getattr(options, name)) for name in DECIDE}
    table = str((options.table or quickstart()).resolve())
    return (
        options.results / "cache" / "plans" / f"{digest(table, os.getcwd(), platform.python_version(), decided)}.json"
    )

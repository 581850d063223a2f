"""The command line that the tasks share: stored predictions, references, metrics."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.base import Task
from eval.files import read_references, read_rows
from eval.submission import write_submission


def run(task: Task, arguments: Sequence[str] | None = None) -> None:
    """Prints the metrics of a file of predictions, or writes it as EvalAI takes it.

    Ends the process with one line on a faulty file.

    Args:
        task: the task whose predictions are scored.
        arguments: arguments of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m eval.{task.name}", description="Scores stored predictions.")
    parser.add_argument("predictions", type=Path, help="JSON lines or a JSON list")
    parser.add_argument("references", type=Path, nargs="?", help="annotations of any layout, or examples as JSON lines")
    parser.add_argument("--split", help="split of a Karpathy file")
    parser.add_argument("--json", action="store_true", help="print JSON, unrounded")
    if task.extra:
        parser.add_argument("--extra", nargs="+", choices=list(task.extra), default=[], help="further metrics, by Java")
    if task.submission:
        parser.add_argument(
            "--evalai",
            type=Path,
            metavar="FILE",
            help="write FILE instead, checked against references (questions) if any",
        )
    asked = parser.parse_args(arguments)
    if task.submission and asked.evalai:
        try:
            key, said = task.submission
            rows = read_rows(asked.predictions)
            written = write_submission(asked.evalai, rows, key=key, said=said, wanted=asked.references)
        except (OSError, ValueError) as error:
            sys.exit(f"{parser.prog}: {error}")
        print(f"{asked.evalai}: {written} predictions")
        return
    if asked.references is None:
        parser.error("references are needed to score")
    try:
        predictions, examples = read_rows(asked.predictions), read_references(asked.references, asked.split)
        metrics = task.score(predictions, examples, **({"extra": asked.extra} if task.extra else {}))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: {error}")
    width = max(map(len, metrics))
    print(json.dumps(metrics) if asked.json else "\n".join(f"{k:<{width}}  {v:7.2f}" for k, v in metrics.items()))

"""What a sweep of ten thousand runs costs beside the runs: `python experiments/benchmarks/many_runs.py`.

The table is real, both embedded models, and its runs do nothing but store a record and predictions as large as real
ones. Planning, the sweep, the same command once more, and reading the results are processes of their own. Writes
results/benchmarks/many_runs.md. Takes about six minutes on two cores and 0.3 GB of disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

SEEDS = 56
TABLE = f"""
[[grid]]
models = ["tiny-blip", "tiny-xvlm"]
methods = ["random", "omp", "lamp", "snip", "multiflow", "chita++", "wanda", "obd", "l2", "localmp"]
sparsities = [0.63, 0.75, 0.9]
tasks = ["retrieval", "captioning", "vqa"]
seeds = {list(range(SEEDS))}
"""
LAYERS = 150  # of a model, whose zeros a record counts
MODALITIES = ("vision", "text", "fusion")
PREDICTIONS = 2_000  # characters
METRICS = {
    "retrieval": [f"{way}_{level}" for way in ("tr", "ir") for level in ("r1", "r5", "r10", "mean")] + ["r_mean"],
    "captioning": ["bleu4", "cider", "rougel"],
    "vqa": ["accuracy"],
}
REPORT = Path(__file__).parents[2] / "results" / "benchmarks" / "many_runs.md"


def store(job: Any, execution: Any, _stopping: Callable[[], bool]) -> None:
    """A run that measures nothing: its files are as large as those of a real one."""
    from vlprune.store.artifacts import Note, written
    from vlprune.store.origin import now
    from vlprune.store.record import RECORD, Record, predictions_path, record_text, run_directory

    if not job.is_run:
        for file in job.files:
            with written(execution.store / file, Note()) as half:
                half.write_text("")
        return
    [config], [key] = job.configs, job.keys
    versions = {f"package{number}": "1.2.3" for number in range(10)}
    origin = {"started": now(), "finished": now(), "host": "host", "device": "none", "commit": "", "versions": versions}
    kinds = ("statistics", "masks", "tuned", "predictions", "record")
    own = Record(
        key=key,
        config=config,
        metrics={metric: float(int(key[:4], 16) % 100) for metric in METRICS[config.task.name]},
        floors={"chance": dict.fromkeys(METRICS[config.task.name], 1.0)},
        sparsity=config.pruning.sparsity,
        modality_sparsity=dict.fromkeys(MODALITIES, config.pruning.sparsity),
        layers={
            f"fusion.layer.{i}.attention.dense": {"modality": MODALITIES[i % 3], "weights": 589_824, "zeros": 3_000 * i}
            for i in range(LAYERS)
        },
        seconds={kind: round(time.perf_counter() % 1000, 3) for kind in kinds},
        peak_memory=2**30,
        left_out={},
        origins=dict.fromkeys(kinds, origin),
        stages={**dict.fromkeys(kinds, key), "settings": f"{config.model.name}{config.task.name}"},
    )
    with written(predictions_path(execution.store, own), Note()) as half:
        half.write_text("x" * PREDICTIONS)
    with written(run_directory(execution.store, key) / RECORD, Note()) as half:
        half.write_text(record_text(own))


# ---- what is measured, each in a process of its own; a dictionary comes back ----


def planning(directory: Path) -> dict[str, float]:
    from vlprune.stages.fingerprints import Fingerprints
    from vlprune.sweep.planner import plan
    from vlprune.sweep.table import load_table

    began = time.process_time()
    planned = plan(load_table(directory / "many.toml"), Fingerprints())
    jobs = planned.jobs(planned.runs, directory / "results")
    return {"runs": len(planned.runs), "jobs": len(jobs), "seconds": time.process_time() - began}


def sweeping(directory: Path) -> dict[str, float]:
    from rich.console import Console

    from vlprune.sweep.aside import PlannerAside
    from vlprune.sweep.command import sweep
    from vlprune.sweep.local import LocalPool
    from vlprune.sweep.options import Options

    options = Options(table=directory / "many.toml", results=directory / "results", jobs=1)
    began, started = time.process_time(), time.monotonic()
    with PlannerAside() as planner, (directory / "output.txt").open("w") as output:
        new_pool = lambda _options, execution, _planner, _most: LocalPool(store, execution, 1)  # noqa: E731
        assert sweep(options, planner, new_pool, Console(file=output, width=160)) == 0
    own = {"seconds": time.process_time() - began, "elapsed": time.monotonic() - started}
    return own | {"memory": _peak(), "torch": float("torch" in sys.modules)}


def reading(directory: Path) -> dict[str, float]:
    import pandas as pd

    from vlprune.reports.load import load_results

    def plain() -> None:
        paths = sorted((directory / "results" / "runs").glob("*/record.json"))
        records = [json.loads(path.read_text()) for path in paths]
        pd.DataFrame(
            [
                {"key": own["key"], "metric": name, "value": value}
                for own in records
                for name, value in own["metrics"].items()
            ]
        )

    found = {}
    for name, read in (("plain", plain), ("load_results", partial(load_results, directory / "results"))):
        began = time.process_time()
        read()
        found[name] = time.process_time() - began
    return found


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024.0


MEASURED = {"planning": planning, "sweeping": sweeping, "reading": reading}


def measured(name: str, directory: Path) -> dict[str, float]:
    """What a process of its own measures."""
    command = [sys.executable, __file__, name, str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures and writes the table."""
    if len(sys.argv) == 3:
        print(json.dumps(MEASURED[sys.argv[1]](Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "many.toml").write_text(TABLE)
        plan, sweep = measured("planning", directory), measured("sweeping", directory)
        again, read = measured("sweeping", directory), measured("reading", directory)
        files = [path for path in (directory / "results").rglob("*") if path.is_file()]
    assert not sweep["torch"]
    runs = plan["runs"]
    each = 1000 * sweep["seconds"] / runs
    lines = [
        "# Ten thousand runs",
        "",
        f"`python experiments/benchmarks/many_runs.py`: {runs:,.0f} runs in {plan['jobs']:,.0f} jobs that store files "
        "and do nothing else, one worker. CPU seconds are those of the sweep's own process, or of the process that "
        "plans or reads.",
        "",
        "| | |",
        "|---|--:|",
        f"| planning | {plan['seconds']:.1f} CPU s |",
        f"| the sweep, from its command to its tables | {sweep['seconds']:.1f} CPU s, {each:.1f} ms a run |",
        f"| its peak memory | {sweep['memory'] / 1e6:.0f} MB |",
        f"| the same command, once finished | {again['seconds']:.1f} CPU s, {again['memory'] / 1e6:.0f} MB |",
        f"| `vlprune.load_results` | {read['load_results']:.1f} CPU s |",
        f"| `json.loads` of every record and one DataFrame | {read['plain']:.1f} CPU s |",
        f"| files | {len(files) / runs:.1f} a run |",
        "",
    ]
    REPORT.write_text("\n".join(lines), encoding="utf-8")
    print(REPORT.read_text())


if __name__ == "__main__":
    main()

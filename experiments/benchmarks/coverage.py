"""How often intervals of a comparison hold the true difference: `python experiments/benchmarks/coverage.py`.

Tables of differences whose truth is zero are drawn, of seeds and images that vary more or less, and compared as
`vlprune.compare` does, by a bootstrap of seeds and images, and over seeds alone. Writes
results/benchmarks/coverage.md. Takes about two minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np

from vlprune.reports.uncertainty import of_seeds, of_seeds_and_images

TABLES, IMAGES, RESAMPLES = 1000, 150, 500
SEEDS = (1, 3, 5, 10)
# Standard deviations of seeds, images and the rest of a difference, such as of accuracies 0 and 1 of a question.
SPREADS = {
    "the rest alone": (0.0, 0.0, 1.0),
    "images": (0.0, 0.3, 1.0),
    "images, seeds a little": (0.05, 0.3, 1.0),
    "images and seeds": (0.1, 0.3, 1.0),
    "seeds most of all": (0.3, 0.3, 1.0),
}
REPORT = Path(__file__).parents[2] / "results" / "benchmarks" / "coverage.md"


def bootstrap(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the percentiles of means of resampled seeds and images."""
    n_seeds, n_images = values.shape
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), RESAMPLES) / n_seeds
    images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), RESAMPLES) / n_images
    low, high = np.percentile(((seeds @ values) * images).sum(1), (2.5, 97.5))
    return float(low), float(high)


def covered(n_seeds: int, spreads: tuple[float, float, float]) -> tuple[float, float, float, float]:
    """Fractions of the tables whose truth is in the interval of `compare`, of the bootstrap, of seeds; mean width."""
    rng, found = np.random.default_rng(n_seeds), np.zeros((TABLES, 3))
    widths = []
    for table in found:
        seed, image, rest = (rng.normal(0, spread, shape) for spread, shape in zip(spreads, _shapes(n_seeds)))
        values = seed + image + rest
        truth = float(seed.mean()) if n_seeds == 1 else 0.0  # of one seed, the difference of that seed is asked for
        intervals = [of_seeds_and_images(values).interval(), bootstrap(values, rng)]
        intervals.append(of_seeds(values.mean(1)).interval())
        table[:] = [low <= truth <= high for low, high in intervals]
        widths.append(intervals[0][1] - intervals[0][0])
    ours, resampled, seeds = found.mean(0)
    return ours, resampled, seeds if n_seeds > 1 else float("nan"), float(np.mean(widths))


def _shapes(n_seeds: int) -> tuple[tuple[int, int], ...]:
    return (n_seeds, 1), (1, IMAGES), (n_seeds, IMAGES)


def main() -> None:
    """Measures and writes the table."""
    lines = [
        "# Coverage of intervals",
        "",
        f"`python experiments/benchmarks/coverage.py`: of {TABLES} tables of differences on {IMAGES} images, whose",
        "truth is zero, the percentage whose 95 % interval holds it. Standard deviations are those of seeds, images",
        "and the rest.",
        "",
        "| what varies | standard deviations | seeds | `compare` | bootstrap of seeds and images | seeds alone | "
        "mean width of `compare` |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, spreads in SPREADS.items():
        for n_seeds in SEEDS:
            *fractions, width = covered(n_seeds, spreads)
            texts = ["–" if np.isnan(own) else f"{100 * own:.1f}" for own in fractions]
            deviations = ", ".join(f"{own:g}" for own in spreads)
            lines.append(f"| {name} | {deviations} | {n_seeds} | {' | '.join(texts)} | {width:.2f} |")
            print(lines[-1], flush=True)
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""How far means are known: by hand, against scipy, and on tables whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from vlprune.reports.uncertainty import holm, of_seeds, of_seeds_and_images

TABLES = 1000


def drawn(rng, n_seeds, n_images, seed=0.0, image=1.0, rest=1.0):
    """Differences (seeds, images) whose true mean is 0, with standard deviations of seeds, images and the rest."""
    own = rng.normal(0, seed, (n_seeds, 1)) + rng.normal(0, image, n_images)
    return own + rng.normal(0, rest, (n_seeds, n_images))


def test_seeds_alone_are_students_t():
    values = [1.0, 2.0, 4.0]
    found, test = of_seeds(values), stats.ttest_1samp(values, 0)
    assert found.p() == pytest.approx(test.pvalue)
    assert found.interval(0.9) == pytest.approx(test.confidence_interval(0.9))
    assert np.isnan([*of_seeds([3.0]).interval(), of_seeds([3.0]).p()]).all()


def test_one_seed_is_students_t_over_images():
    values = np.array([[1.0, 2.0, 4.0, -1.0]])
    found, test = of_seeds_and_images(values), stats.ttest_1samp(values[0], 0)
    assert found.p() == pytest.approx(test.pvalue)
    assert found.interval() == pytest.approx(test.confidence_interval(0.95))


def test_two_factors_by_hand():
    values = np.array([[1.0, 5.0, 3.0], [4.0, 10.0, 4.0]])
    # Means: seeds 3 and 6, images 2.5, 7.5, 3.5, all 4.5. Mean squares: seeds 3 * (1.5² + 1.5²) = 13.5; images
    # 2 * (2² + 3² + 1²) / 2 = 14; rest: ±(0, 1, -1) twice, 4 / 2 = 2.
    found = of_seeds_and_images(values)
    assert found.mean == 4.5
    assert found.error**2 == pytest.approx((13.5 + 14 - 2) / 6)
    assert found.freedom == pytest.approx(25.5**2 / (13.5**2 / 1 + 14**2 / 2 + 2**2 / 2))


def test_equal_differences_have_no_width_and_are_certain():
    found = of_seeds_and_images(np.full((3, 5), 2.0))
    assert (found.interval(), found.p()) == ((2.0, 2.0), 0.0)
    assert of_seeds_and_images(np.zeros((3, 5))).p() == 1.0


@pytest.mark.parametrize("n_seeds", [1, 3, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(n_seeds):
    rng = np.random.default_rng(n_seeds)
    tables = [drawn(rng, n_seeds, 150, seed=0.1 * (n_seeds > 1)) for _ in range(TABLES)]
    found = [of_seeds_and_images(values) for values in tables]
    for level, low, high in ((0.95, 0.93, 0.97), (0.8, 0.76, 0.84)):
        covered = np.mean([least <= 0 <= most for least, most in (own.interval(level) for own in found)])
        assert low <= covered <= high
    assert np.mean([own.p() <= 0.05 for own in found]) == np.mean(
        [not own.interval()[0] <= 0 <= own.interval()[1] for own in found]
    )


@pytest.mark.parametrize("n_seeds", [1, 3, 10])
def test_a_table_without_differences_shows_one_in_one_of_twenty_at_most(n_seeds):
    """Ten methods against one baseline, whose numbers all comparisons of a table have in common."""
    rng, wrong = np.random.default_rng(n_seeds), 0
    for _ in range(TABLES // 2):
        base = drawn(rng, n_seeds, 60, seed=0.1 * (n_seeds > 1))
        methods = [drawn(rng, n_seeds, 60, seed=0.1 * (n_seeds > 1)) for _ in range(10)]
        wrong += bool((holm([of_seeds_and_images(own - base).p() for own in methods]) <= 0.05).any())
    assert wrong / (TABLES // 2) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / (TABLES // 2))  # two standard errors


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert list(holm([])) == []
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])

"""What is read ahead by threads is what is read without them."""

import threading
from functools import partial

import pytest
from conftest import small_model

from eval import TASKS
from eval.retrieval import RetrievalOptions
from vlprune.data import calibration_batches, load_pairs
from vlprune.data.ahead import ROWS, ahead, read_ahead


def test_calls_are_made_before_they_are_asked_for_and_come_in_order():
    made, third = [], threading.Event()

    def call(number):
        made.append(number)
        if number == 2:
            third.set()
        return number

    values = ahead((partial(call, number) for number in range(10)), threads=3)
    assert next(values) == 0
    assert third.wait(10)
    assert list(values) == list(range(1, 10))
    assert sorted(made) == list(range(10))


def test_without_threads_a_call_is_made_when_it_is_asked_for():
    made = []
    values = ahead((partial(made.append, number) for number in range(3)), threads=0)
    next(values)
    assert made == [0]


def test_an_error_comes_in_its_turn_and_who_stops_asking_leaves_no_thread():
    before = threading.active_count()
    values = ahead((partial(divmod, 6, number) for number in (3, 2, 0, 1)), threads=2)
    assert [next(values), next(values)] == [(2, 0), (3, 0)]
    with pytest.raises(ZeroDivisionError):
        next(values)
    endless = ahead(iter(lambda: partial(int, 5), None), threads=2)
    assert next(endless) == 5
    endless.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["scenes", "stream"])
def test_batches_of_calibration_are_the_same_with_threads(name, tmp_path, scenes_cache):
    if name == "stream":
        name = str(shards(tmp_path))

    def drawn(threads):
        model = small_model("xvlm")
        batches = calibration_batches(name, model, n_batches=5, batch_size=4, seed=1, first=2, threads=threads)
        assert batches.threads == threads
        return [(batch.texts, batch.regions, [image.tobytes() for image in batch.images]) for batch in batches]

    assert drawn(3) == drawn(0)


def shards(root):
    """A directory of parquet files."""
    import datasets

    rows = load_pairs("scenes", "train", 24)
    texts = {"image": [row["image"] for row in rows], "caption": [row["captions"][0] for row in rows]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(texts, features=features).to_parquet(root / "train-00000.parquet")
    return root


def test_predictions_are_the_same_with_threads(scenes_cache):
    model, test = small_model("xvlm"), load_pairs("scenes", "test", 12)
    expected = TASKS["retrieval"].predict(model, test, RetrievalOptions())
    with read_ahead(test, 2) as rows:
        assert TASKS["retrieval"].predict(model, rows, RetrievalOptions()) == expected
        assert rows is not test
    with read_ahead(test, 0) as rows:
        assert rows is test


def test_rows_are_read_ahead_and_those_that_were_skipped_are_forgotten():
    asked = []

    class Rows(list):
        def __getitem__(self, row):
            asked.append(row)
            assert row >= 1000 or threading.current_thread() is not threading.main_thread()
            return list.__getitem__(self, row)

    own = Rows(range(1000))
    with read_ahead(own, 2) as rows:
        assert [rows[0], rows[500], rows[501]] == [0, 500, 501]
        assert rows[998:] == [998, 999]
        with pytest.raises(IndexError):
            rows[1000]
    assert len(asked) == len(set(asked))
    assert not set(asked) & set(range(ROWS + 1, 500))

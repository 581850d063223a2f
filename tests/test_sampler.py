import pytest
import torch
from datasets import Dataset

from vlprune.finetune.sampler import AugmentedExamples, CaptionExamples, PassSampler, not_augmented


def flat(batches):
    return [number for batch in batches for number in batch]


def epochs(n, count, **settings):
    """The passes of some epochs."""
    settings = {"device_batch": None, "generator": torch.Generator().manual_seed(0), **settings}
    passes = PassSampler(n, **settings)
    found = [list(passes) for _ in range(count)]
    assert all(len(epoch) == len(passes) for epoch in found)
    return found


def test_an_epoch_numbers_on_from_the_last():
    first, second = epochs(6, 2, batch_size=3, steps=2)
    assert sorted(flat(first)) == list(range(6))
    assert sorted(flat(second)) == list(range(6, 12))
    assert [number - 6 for number in flat(second)] != flat(first)


def test_the_last_batch_is_filled_up_with_the_first_examples():
    (epoch,) = epochs(5, 1, batch_size=3, steps=2)
    assert [len(batch) for batch in epoch] == [3, 3]
    assert epoch[1][2] == epoch[0][0]
    assert sorted({*epoch[0], *epoch[1]}) == list(range(5))


@pytest.mark.parametrize(
    ("n", "batch_size", "device_batch", "world", "sizes"),
    [
        (100, 8, None, 1, [8]),
        (100, 8, 4, 1, [4, 4]),
        (100, 10, 4, 1, [4, 3, 3]),
        (100, 8, 2, 2, [2, 2]),
        (5, 8, 3, 1, [3, 2]),
        (100, 8, 100, 1, [8]),
    ],
)
def test_a_batch_is_split_evenly(n, batch_size, device_batch, world, sizes):
    for rank in range(world):
        share = {"device_batch": device_batch, "rank": rank, "world": world}
        (epoch,) = epochs(n, 1, batch_size=batch_size, steps=1, **share)
        assert [len(numbers) for numbers in epoch] == sizes


def test_processes_share_the_batch_of_one():
    settings = {"batch_size": 8, "device_batch": 2, "steps": 3}
    (alone,) = epochs(24, 1, **settings)
    shares = [epochs(24, 1, **settings, rank=rank, world=2)[0] for rank in range(2)]
    steps = [sorted(flat(alone[4 * i : 4 * i + 4])) for i in range(3)]
    together = [sorted(flat(shares[0][2 * i : 2 * i + 2] + shares[1][2 * i : 2 * i + 2])) for i in range(3)]
    assert together == steps


def test_every_caption_is_an_example():
    pairs = Dataset.from_dict({"image_id": [7, 8, 9], "captions": [["a", "b"], [], ["c"]]})
    captions = CaptionExamples(pairs)
    assert len(captions) == 3
    assert [captions[i] for i in range(3)] == [
        {"image_id": 7, "captions": ["a"]},
        {"image_id": 7, "captions": ["b"]},
        {"image_id": 9, "captions": ["c"]},
    ]


def test_an_example_is_augmented_by_its_running_number():
    examples = [{"x": "a"}, {"x": "b"}]
    augmented = AugmentedExamples(examples, lambda example, number: {**example, "number": number})
    assert augmented[3] == {"x": "b", "number": 3}
    assert AugmentedExamples(examples, not_augmented)[2] == {"x": "a"}
    assert examples == [{"x": "a"}, {"x": "b"}]

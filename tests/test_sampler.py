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
    ("n", "batch_size", "device_batch", "sizes"),
    [
        (100, 8, None, [8]),
        (100, 8, 4, [4, 4]),
        (100, 10, 4, [4, 3, 3]),
        (5, 8, 3, [3, 2]),
        (100, 8, 100, [8]),
    ],
)
def test_a_batch_is_split_evenly(n, batch_size, device_batch, sizes):
    (epoch,) = epochs(n, 1, batch_size=batch_size, device_batch=device_batch, steps=1)
    assert [len(numbers) for numbers in epoch] == sizes


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_pass_of_one(world):
    settings = {"batch_size": 8, "device_batch": 4, "steps": 3}
    (alone,) = epochs(24, 1, **settings)
    shares = [epochs(24, 1, **settings, rank=rank, world=world)[0] for rank in range(world)]
    assert [flat(passes) for passes in zip(*shares, strict=True)] == alone
    assert {len(numbers) for share in shares for numbers in share} == {4 // world, -(-4 // world)}


def test_a_pass_with_fewer_examples_than_processes_is_refused():
    with pytest.raises(ValueError, match="a forward pass of 1 examples cannot be shared by 2 processes"):
        epochs(24, 1, batch_size=3, device_batch=2, steps=1, world=2)


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

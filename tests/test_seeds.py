import itertools

from vlprune.seeds import seed_of


def test_no_two_purposes_steps_or_neighbouring_seeds_share_a_stream():
    purposes = [("order of examples",), ("loss",), *(("search step", step) for step in range(20))]
    found = [seed_of(seed, *purpose) for seed, purpose in itertools.product(range(20), purposes)]
    assert len(set(found)) == len(found)
    assert all(0 <= value < 2**63 for value in found)


def test_a_seed_is_the_same_in_every_process():
    assert seed_of(0, "loss") == 6298005799305693609

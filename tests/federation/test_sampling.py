"""Which clients take part: sorted, seeded per round, without replacement."""

import pytest

from fedproxy.errors import ConfigError
from fedproxy.federation.server.sampling import sample_clients

NAMES = [f"c{i}" for i in range(10)]


def test_all_means_all_sorted():
    assert sample_clients(["b", "a"], "all", seed=0, round=1) == ["a", "b"]


def test_draws_depend_on_seed_and_round_and_not_on_the_order_of_names():
    first = sample_clients(NAMES, 4, seed=1, round=1)
    assert first == sorted(set(first))
    assert len(first) == 4
    assert first == sample_clients(NAMES[::-1], 4, seed=1, round=1)
    assert len({tuple(sample_clients(NAMES, 4, seed=1, round=r)) for r in range(1, 9)}) > 4


def test_over_many_rounds_everyone_takes_part():
    # 60 rounds of 3 of 10: each is expected 18 times; a bias to low indices would show
    counts = [sum(name in sample_clients(NAMES, 3, seed=5, round=r) for r in range(60)) for name in NAMES]
    assert sum(counts) == 180
    assert min(counts) >= 8


def test_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"must be at most the 10 clients there are, got 11"):
        sample_clients(NAMES, 11, seed=0, round=1)


def test_weighted_draws_follow_the_rows():
    # One of c0 (3 rows) and c1 (1 row) per round: c0 is expected in 3/4 of 400 draws, standard deviation 8.7.
    rows = {"c0": 3, "c1": 1}
    draws = [sample_clients(list(rows), 1, seed=2, round=r, rows=rows)[0] for r in range(400)]
    assert 265 <= draws.count("c0") <= 335


def test_weighted_draws_are_without_replacement_and_repeatable():
    rows = {name: 1 + 99 * (name == "c7") for name in NAMES}
    drawn = [sample_clients(NAMES, 3, seed=1, round=r, rows=rows) for r in range(50)]
    assert drawn == [sample_clients(NAMES[::-1], 3, seed=1, round=r, rows=rows) for r in range(50)]
    assert all(len(set(names)) == 3 for names in drawn)
    assert sum("c7" in names for names in drawn) == 50  # misses a round with chance (9/109)(8/108)(7/107) = .0004

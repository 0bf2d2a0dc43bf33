"""Robust rules: hand values, brute force, and what they are for (a hostile client)."""

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.robust import bulyan_selection, geometric_median, sort_clients, squared_distances


def aggregate(name, *deltas, examples=None, memory=None, **options):
    counts = examples or [1] * len(deltas)
    updates = [
        ClientUpdate(f"c{i:02d}", {"w": torch.tensor(delta)}, num_examples=n)
        for i, (delta, n) in enumerate(zip(deltas, counts, strict=True))
    ]
    return Aggregator.by_name(name)(**options).aggregate(updates, memory)


def merge(name, *deltas, **options):
    return aggregate(name, *deltas, **options).delta["w"].tolist()


@pytest.mark.parametrize("clients", range(1, 20))
def test_the_sorting_network_sorts_any_number_of_clients(clients):
    values = torch.randn(clients, 200, generator=torch.Generator().manual_seed(clients)).round(decimals=1)
    assert torch.equal(torch.stack(sort_clients(values)), values.sort(dim=0).values)


def test_median_of_odd_and_even_counts():
    assert merge("median", [1.0], [100.0], [2.0]) == [2.0]
    assert merge("median", [1.0], [100.0], [2.0], [4.0]) == [3.0]


def test_trimmed_mean_cuts_the_floor_from_each_tail():
    five = ([1.0], [2.0], [3.0], [4.0], [100.0])
    assert merge("trimmed_mean", *five, beta=0.2) == [3.0]  # .2 * 5 = 1 from each tail
    assert merge("trimmed_mean", *five, beta=0.19) == [22.0]  # .95 rounds down to 0: the plain mean
    # .3 * 10 is 3.0000000000000004 or 2.9999...: three are cut either way
    assert merge("trimmed_mean", *([float(v)] for v in (-900, -90, -9, 1, 2, 3, 4, 9, 90, 900)), beta=0.3) == [2.5]


def test_krum_uses_the_distance_of_the_whole_update():
    # c0..c3 sit together, c4 is far away; c1 is in their middle
    deltas = ([0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.5], [50.0, 50.0])
    # two nearest others (5 - 1 - 2): c0 1 + 3.25, c1 1 + 1, c2 1 + 3.25, c3 2.25 + 3.25
    assert merge("krum", *deltas, byzantine=1) == [1.0, 0.0]
    assert merge("multi_krum", *deltas, byzantine=1, keep=3) == [1.0, 0.0]  # c1, c0, c2
    assert merge("multi_krum", *deltas, byzantine=1) == [1.0, 0.375]  # all but one


def test_krum_distances_survive_large_common_offsets():
    # squared distances of about 1 between updates of norm 1e4
    deltas = [[1e4, 0.0], [1e4, 1.0], [1e4, 2.0], [1e4, 3.5], [1e4, 9.0]]
    assert merge("krum", *deltas, byzantine=1) == [1e4, 1.0]


def test_bulyan_picks_by_repeated_krum_and_averages_round_the_median():
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0]
    rows = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    picked = bulyan_selection(squared_distances(rows @ rows.T), 1)
    assert len(picked) == 5
    assert 6 not in picked
    chosen = sorted(values[i] for i in picked)
    median = chosen[2]
    nearest = sorted(chosen, key=lambda v: abs(v - median))[:3]
    assert merge("bulyan", *([v] for v in values), byzantine=1) == [pytest.approx(sum(nearest) / 3)]


@pytest.mark.parametrize(("name", "needed"), [("krum", 5), ("multi_krum", 5), ("bulyan", 7)])
def test_too_few_clients_are_refused(name, needed):
    with pytest.raises(ConfigError, match=f"'{name}' with byzantine=1 needs at least {needed} clients a round, got 4"):
        merge(name, [1.0], [2.0], [3.0], [4.0], byzantine=1)


def test_geometric_median_on_a_line_is_the_weighted_median():
    # weights 1, 1, 3: the third client holds more than half of the weight
    assert merge("geometric_median", [0.0], [1.0], [5.0], examples=[1, 1, 3]) == [5.0]
    assert merge("geometric_median", [0.0], [1.0], [5.0], examples=[1, 1, 3], weighting="uniform") == [1.0]


def test_geometric_median_of_a_square_is_its_centre():
    merged = merge("geometric_median", [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0])
    assert merged == pytest.approx([0.0, 0.0], abs=1e-6)


def test_geometric_median_has_no_pull_left():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 20, generator=rng, dtype=torch.float64)
    weights = torch.tensor([1.0, 2, 3, 1, 1, 1], dtype=torch.float64) / 9
    point = geometric_median(rows @ rows.T, weights) @ rows
    pulls = weights.unsqueeze(1) * torch.nn.functional.normalize(rows - point)
    assert float(pulls.sum(dim=0).norm()) < 1e-9


def test_norm_bound_scales_long_updates_down():
    # norms 5 and 1 with bound 2: (3, 4) * 2/5 and (0, 1), then the mean
    assert merge("norm_bound", [3.0, 4.0], [0.0, 1.0], bound=2.0) == pytest.approx([0.6, 1.3])


def test_centered_clipping_by_hand_and_across_rounds():
    # round 1 from 0, radius 1: (4) counts 1/4 of itself, (-1) in full: (1 - 1) / 2 = 0
    first = aggregate("centered_clipping", [4.0], [-1.0], radius=1.0)
    assert first.delta["w"].tolist() == [0.0]
    # from centre 2: 4 is at distance 2 -> +1, 2.5 at .5 -> +.5: 2 + 1.5 / 2
    later = aggregate("centered_clipping", [4.0], [2.5], radius=1.0, memory={"w": torch.tensor([2.0])})
    assert later.delta["w"].tolist() == pytest.approx([2.75])
    assert later.memory["w"].tolist() == pytest.approx([2.75])
    # a second step from 2.75: 1.25 -> +1, -.25: 2.75 + .75 / 2
    twice = aggregate("centered_clipping", [4.0], [2.5], radius=1.0, iterations=2, memory={"w": torch.tensor([2.0])})
    assert twice.delta["w"].tolist() == pytest.approx([3.125])


ROBUST = ("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "centered_clipping")


@pytest.mark.parametrize("name", ROBUST)
def test_one_hostile_client_of_seven_moves_the_result_little(name):
    rng = torch.Generator().manual_seed(5)
    honest = 1.0 + 0.1 * torch.randn(7, 50, generator=rng)
    honest[6] = -1000.0
    options = {"beta": 0.2} if name == "trimmed_mean" else {"radius": 10.0} if name == "centered_clipping" else {}
    merged = torch.tensor(merge(name, *honest.tolist(), **options))
    mean = torch.tensor(merge("fedavg", *honest.tolist()))
    assert float((mean - 1).abs().max()) > 100
    assert float((merged - 1).abs().max()) < (1.5 if name == "centered_clipping" else 0.3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trimmed_mean", {"beta": 0.5}, r"aggregator.beta must be in \[0, 0.5\), got 0.5"),
        ("krum", {"byzantine": -1}, r"aggregator.byzantine must be >= 0, got -1"),
        ("multi_krum", {"keep": 0}, r"aggregator.keep must be >= 1 or null, got 0"),
        ("geometric_median", {"weighting": "x"}, "aggregator.weighting must be one of examples, tokens, uniform"),
        ("norm_bound", {"bound": 0.0}, r"aggregator.bound must be > 0, got 0.0"),
        ("centered_clipping", {"radius": 0.0}, r"aggregator.radius must be > 0, got 0.0"),
        ("centered_clipping", {"iterations": 0}, r"aggregator.iterations must be >= 1, got 0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ConfigError, match=message):
        Aggregator.by_name(name)(**options)

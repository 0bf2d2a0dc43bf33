"""Every rule equals its definition: plain torch on whole updates in float64, which a reader checks beside the paper."""

import pytest
import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.h_ties import h_ties
from fedproxy.strategies.functional.means import (
    bulyan,
    centered_clipping,
    fedavg,
    geometric_median_cost,
    median,
    multi_krum,
    norm_bound,
    task_arithmetic,
    trimmed_mean,
)
from fedproxy.strategies.functional.ties import ties

SHAPES = {"a.weight": (7, 11), "b.weight": (300,), "c": ()}
SIZE = 378
DEFINITIONS = {
    "fedavg": (lambda rows, shares: fedavg(rows, shares), [{}]),
    "task_arithmetic": (lambda rows, shares, **o: task_arithmetic(rows, **o), [{}, {"scale": 1.5}]),
    "h_ties": (
        lambda rows, shares, **options: h_ties(rows, **options)[0],
        [{}, {"r0": 0.7, "delta": 0.6}, {"rho": 1.0}, {"rho": 3.0, "eps": 1e-2}, {"r0": 0.001, "delta": 0.0}],
    ),
    "ties": (lambda rows, shares, **o: ties(rows, **o), [{}, {"density": 1.0, "scale": 0.5}, {"density": 0.01}]),
    "median": (lambda rows, shares: median(rows), [{}]),
    "trimmed_mean": (lambda rows, shares, **o: trimmed_mean(rows, **o), [{}, {"beta": 0.3}]),
    "norm_bound": (lambda rows, shares, **o: norm_bound(rows, **o), [{}, {"bound": 15.0}, {"bound": 100.0}]),
    "centered_clipping": (
        lambda rows, shares, **o: centered_clipping(rows, torch.zeros(SIZE).double(), **o),
        [{}, {"radius": 16.0, "iterations": 3}],
    ),
    "krum": (lambda rows, shares, **o: multi_krum(rows, keep=1, **o), [{}, {"byzantine": 0}]),
    "multi_krum": (lambda rows, shares, **o: multi_krum(rows, **o), [{}, {"keep": 2}, {"byzantine": 2}]),
    "bulyan": (lambda rows, shares, **o: bulyan(rows, **o), [{}, {"byzantine": 0}]),
}
CASES = [
    pytest.param(name, options, id=f"{name}-{options}") for name, (_, some) in DEFINITIONS.items() for options in some
]


def make_updates(clients, seed, grid):
    """Return updates; on a grid, magnitudes tie, sums vanish and coordinates stay where they were."""
    rng = torch.Generator().manual_seed(seed)
    updates = []
    for k in range(clients):
        delta = {name: torch.randn(shape, generator=rng) * (1 + k / 4) for name, shape in SHAPES.items()}
        if grid:
            delta = {name: (2 * tensor).round() / 2 for name, tensor in delta.items()}
        updates.append(ClientUpdate(f"c{k}", delta, num_examples=k + 1))
    return updates


def whole(updates):
    """Return float64 (clients, n): tensors by name, row-major."""
    return torch.stack([flat(update.delta) for update in updates])


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("clients", [7, 8])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_rule_gives_what_its_definition_says(name, options, clients, grid):
    updates = make_updates(clients, seed=clients, grid=grid)
    shares = torch.arange(1, clients + 1).double() / (clients * (clients + 1) / 2)
    wanted = DEFINITIONS[name][0](whole(updates), shares, **options)
    found = flat(Aggregator.by_name(name)(**options).aggregate(updates).delta)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_conflict_map_is_equation_7():
    updates = make_updates(5, seed=1, grid=True)
    found = Aggregator.by_name("h_ties")().aggregate(updates).conflict
    assert found is not None
    torch.testing.assert_close(flat(found), h_ties(whole(updates))[1], rtol=0, atol=1e-6)


def test_centered_clipping_starts_from_the_last_centre():
    rule = Aggregator.by_name("centered_clipping")(radius=12.0)
    first, second = make_updates(4, 1, grid=False), make_updates(4, 2, grid=False)
    memory = rule.aggregate(first).memory
    centre = centered_clipping(whole(first), torch.zeros(SIZE).double(), radius=12.0)
    wanted = centered_clipping(whole(second), centre, radius=12.0)
    torch.testing.assert_close(flat(rule.aggregate(second, memory).delta), wanted, rtol=1e-5, atol=1e-6)


def test_no_point_near_the_geometric_median_costs_less():
    updates = make_updates(6, seed=4, grid=False)
    shares = torch.arange(1, 7).double() / 21
    found = flat(Aggregator.by_name("geometric_median")().aggregate(updates).delta)
    least = geometric_median_cost(found, whole(updates), shares)
    steps = torch.randn(50, SIZE, generator=torch.Generator().manual_seed(0)).double()
    for step in (*steps, *(whole(updates) - found)):
        assert geometric_median_cost(found + 0.01 * step, whole(updates), shares) > least


def test_h_ties_on_the_paper_notes_numbers():
    # Equal and opposite updates: no sign reaches the ratio. Conflict 1 where they oppose, 0 where they agree.
    merged, conflict = h_ties(torch.tensor([[1.0, -3.0, 2.0], [-1.0, 3.0, 2.0]]).double(), delta=0.0)
    assert merged.tolist() == pytest.approx([0.0, 0.0, 2.0])
    assert conflict.tolist() == [1.0, 1.0, 0.0]

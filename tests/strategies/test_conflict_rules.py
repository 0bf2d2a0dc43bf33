"""pcgrad, cagrad, config and mgda, by hand and by the property that defines each."""

import math

import pytest
import torch
from scipy.optimize import minimize

from fedproxy.errors import ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.gradients import cagrad, mgda, pcgrad
from fedproxy.strategies.functional.simplex import project_on_simplex


def merge(name, *deltas, **options):
    updates = [ClientUpdate(f"c{i}", {"w": torch.tensor(delta)}) for i, delta in enumerate(deltas)]
    return Aggregator.by_name(name)(**options).aggregate(updates).delta["w"]


def gram_of(*rows):
    stacked = torch.tensor(rows, dtype=torch.float64)
    return stacked @ stacked.T


def test_pcgrad_of_two_opposing_updates():
    # (1, 0) . (-1, 1) = -1: (1, 0) + 1/2 (-1, 1) = (.5, .5); (-1, 1) + 1 (1, 0) = (0, 1); mean (.25, .75)
    torch.testing.assert_close(merge("pcgrad", [1.0, 0.0], [-1.0, 1.0]), torch.tensor([0.25, 0.75]))


def test_pcgrad_is_the_mean_without_conflict():
    torch.testing.assert_close(merge("pcgrad", [1.0, 0.0], [1.0, 2.0]), torch.tensor([1.0, 1.0]))


def test_pcgrad_equals_the_projection_of_whole_vectors():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    orders = torch.stack([torch.randperm(5, generator=rng) for _ in range(5)])
    projected = rows.clone()
    for i in range(5):
        for j in orders[i].tolist():
            inner = projected[i] @ rows[j]
            if j != i and inner < 0:
                projected[i] -= inner / (rows[j] @ rows[j]) * rows[j]
    torch.testing.assert_close(pcgrad(rows @ rows.T, orders) @ rows, projected.mean(0))


def test_config_has_equal_positive_cosines_and_the_sum_of_projections():
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 30, generator=rng)
    total = merge("config", *rows.tolist())
    cosines = torch.nn.functional.cosine_similarity(rows, total.unsqueeze(0))
    assert float(cosines.min()) > 0
    torch.testing.assert_close(cosines, cosines.mean().expand(4), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total.norm(), (rows @ (total / total.norm())).sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merge("config", *rows.tolist(), length="mean"), total / 4)


def test_config_of_opposite_updates_and_with_a_zero_update():
    assert merge("config", [1.0, 0.0], [-2.0, 0.0]).tolist() == [0.0, 0.0]
    assert merge("config", [0.0, 0.0], [0.0, 0.0]).tolist() == [0.0, 0.0]
    # the zero update has no direction; the other's sum of projections is its own norm
    torch.testing.assert_close(merge("config", [3.0, 4.0], [0.0, 0.0]), torch.tensor([3.0, 4.0]))


def test_mgda_by_hand():
    # the segment from (2, 0) to (0, 1) is nearest to 0 at (.4, .8): weights 1/5, 4/5
    torch.testing.assert_close(merge("mgda", [2.0, 0.0], [0.0, 1.0]), torch.tensor([0.4, 0.8]))
    # (1, 1) lies nearer to 0 than anything between it and (3, 3)
    torch.testing.assert_close(merge("mgda", [1.0, 1.0], [3.0, 3.0]), torch.tensor([1.0, 1.0]))


def test_mgda_meets_its_optimality_condition():
    rng = torch.Generator().manual_seed(2)
    for clients in (3, 6, 10):
        rows = torch.randn(clients, 40, generator=rng, dtype=torch.float64) + 0.3
        gram = rows @ rows.T
        weights = mgda(gram)
        assert float(weights.min()) >= 0
        assert float(weights.sum()) == pytest.approx(1.0)
        slopes = gram @ weights  # at the minimum no vertex has a smaller inner product than the point itself
        assert float(slopes.min()) == pytest.approx(float(weights @ slopes), rel=1e-6)


def test_cagrad_by_hand():
    # orthonormal updates: by symmetry g_w = g0 and d = (1 + c) g0
    torch.testing.assert_close(merge("cagrad", [1.0, 0.0], [0.0, 1.0], c=0.5), torch.tensor([0.75, 0.75]))
    torch.testing.assert_close(merge("cagrad", [1.0, 0.0], [0.0, 3.0], c=0.0), torch.tensor([0.5, 1.5]))


def test_cagrad_equals_scipys_solution_of_its_dual():
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 8, generator=rng, dtype=torch.float64)
    gram = rows @ rows.T
    mean = torch.full((5,), 0.2, dtype=torch.float64)
    radius = 0.4 * math.sqrt(float(mean @ gram @ mean))

    def dual(w):
        w = torch.tensor(w, dtype=torch.float64)
        return float(w @ gram @ mean + radius * (w @ gram @ w).sqrt())

    best = minimize(
        dual,
        [0.2] * 5,
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: sum(w) - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    w = torch.tensor(best.x)
    expected = mean + radius / (w @ gram @ w).sqrt() * w
    torch.testing.assert_close(cagrad(gram, c=0.4), expected, rtol=1e-4, atol=1e-5)


def test_projection_on_the_simplex_by_hand():
    point = project_on_simplex(torch.tensor([1.2, 0.2, -1.0], dtype=torch.float64))
    torch.testing.assert_close(point, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    point = project_on_simplex(torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64))
    torch.testing.assert_close(point, torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64) + 0.1 / 3)


def test_zero_updates_do_not_divide():
    zero = gram_of([0.0], [0.0])
    assert mgda(zero).tolist() == [0.5, 0.5]
    assert cagrad(zero, c=0.5).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cagrad", {"c": 1.0}, r"aggregator.c must be in \[0, 1\), got 1.0"),
        ("config", {"length": "long"}, "aggregator.length must be one of sum, mean, got 'long'"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ConfigError, match=message):
        Aggregator.by_name(name)(**options)

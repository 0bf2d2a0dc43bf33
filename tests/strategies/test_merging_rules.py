"""DARE, DELLA, breadcrumbs, SCE, Model Stock, Consensus, Fisher and RegMean on values worked by hand."""

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.sparse import keep_probabilities
from fedproxy.strategies.functional.trimming import magnitude_window


def aggregate(name, *deltas, extras=None, examples=None, **options):
    updates = [
        ClientUpdate(
            f"c{i}",
            {"w": torch.tensor(delta)},
            num_examples=examples[i] if examples else 1,
            extras=extras[i] if extras else {},
        )
        for i, delta in enumerate(deltas)
    ]
    return Aggregator.by_name(name)(**options).aggregate(updates).delta["w"]


def test_dare_keeps_the_expected_share_and_rescales():
    ones = torch.ones(20_000).tolist()
    merged = aggregate("dare", ones, drop_rate=0.75)
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert float((merged > 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    # without dropping, the linear merge is the weighted mean
    torch.testing.assert_close(aggregate("dare", [1.0], [5.0], examples=[1, 3], drop_rate=0.0), torch.tensor([4.0]))


def test_dare_draws_differ_between_clients():
    merged = aggregate("dare", [1.0] * 4000, [1.0] * 4000, drop_rate=0.5)
    # independent halves: both 1/4, one 1/2, none 1/4
    shares = [float((merged == value).float().mean()) for value in (0.0, 1.0, 2.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("clients", [3, 64])
def test_what_dare_drops_of_a_client_does_not_depend_on_how_many_others_there_are(clients):
    """More clients cut a tensor into shorter blocks: 600,000 coordinates of two clients are 2, of 64 clients 37."""
    size = 600_000
    others = [ClientUpdate(f"other {k}", {"w": torch.zeros(size)}) for k in range(clients - 1)]
    kept = [
        Aggregator.by_name("dare")(drop_rate=0.5).aggregate([ClientUpdate("c", {"w": torch.ones(size)}), *some]).delta
        for some in (others[:1], others)
    ]
    assert torch.equal(kept[0]["w"] != 0, kept[1]["w"] != 0)


def test_dare_with_ties_votes_on_what_is_left():
    # nothing dropped: 3 - 2 > 0 elects +, whose mean is 3
    torch.testing.assert_close(aggregate("dare", [3.0], [-2.0], drop_rate=0.0, merge="ties"), torch.tensor([3.0]))


def test_della_probabilities_rise_with_the_rank_in_the_row():
    values = torch.tensor([[[0.1, -3.0, 2.0], [5.0, 4.0, -6.0]]])
    keep = keep_probabilities(values, density=0.5, window=0.4)
    torch.testing.assert_close(keep, torch.tensor([[[0.3, 0.7, 0.5], [0.5, 0.3, 0.7]]]))
    torch.testing.assert_close(keep_probabilities(torch.tensor([2.0]), density=0.5, window=0.4), torch.tensor([0.5]))


def test_della_divides_by_the_probability():
    row = [1.0] * 10_000 + [2.0] * 10_000
    merged = aggregate("della", row, density=0.5, window=0.2)
    # the mean is kept: sum of v / p over a share p of the coordinates
    assert float(merged.mean()) == pytest.approx(1.5, abs=0.05)
    # the large half is kept with probability .55 on average, the small with .45
    assert float((merged[10_000:] != 0).float().mean()) == pytest.approx(0.55, abs=0.02)
    assert float((merged[:10_000] != 0).float().mean()) == pytest.approx(0.45, abs=0.02)


def test_breadcrumbs_drops_outliers_and_small_values():
    row = [0.1, -9.0, 3.0, -2.0, 0.5, 1.0, 0.2, 0.3, 0.4, 0.6]
    # gamma .1 drops -9; density .3 keeps 3, -2, 1
    merged = aggregate("breadcrumbs", row, density=0.3, gamma=0.1)
    torch.testing.assert_close(merged, torch.tensor([0, 0, 3.0, -2.0, 0, 1.0, 0, 0, 0, 0]))


def test_breadcrumbs_keeps_all_where_the_outlier_count_rounds_to_zero():
    # floor(.01 * 4) = 0 outliers; mergekit's slice [n:-0] once emptied the tensor here
    assert aggregate("breadcrumbs", [1.0, 2.0, 3.0, 4.0], density=1.0, gamma=0.01).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert magnitude_window(torch.ones(1, 4), 1, 2).tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_sce_by_hand():
    # energies 1 + 16 = 17 and 9 + 4 = 13 of 30; sums 1 - 3 < 0 and 4 + 2 > 0:
    # only c1 agrees on the first: -3; both on the second: (17 * 4 + 13 * 2) / 30
    torch.testing.assert_close(aggregate("sce", [1.0, 4.0], [-3.0, 2.0]), torch.tensor([-3.0, 94 / 30]))
    # half of the coordinates: variances 4 and 1 select the first; energies 1 and 9
    torch.testing.assert_close(aggregate("sce", [1.0, 4.0], [-3.0, 2.0], density=0.5), torch.tensor([-3.0, 0.0]))


def test_model_stock_by_hand():
    # cos of (1, 0) and (1, 1) is 1/sqrt 2: t = 2 cos / (1 + cos)
    cos = 0.5**0.5
    t = 2 * cos / (1 + cos)
    torch.testing.assert_close(aggregate("model_stock", [1.0, 0.0], [1.0, 1.0]), torch.tensor([t, t / 2]))
    # orthogonal updates: t = 0; opposite ones: the denominator vanishes
    assert aggregate("model_stock", [1.0, 0.0], [0.0, 1.0]).tolist() == [0.0, 0.0]
    assert aggregate("model_stock", [1.0, 0.0], [-1.0, 0.0]).tolist() == [0.0, 0.0]


def test_consensus_keeps_what_two_clients_use():
    # sums 5, 3, 4.1; c0: 3 >= .4 * 2, 3 >= 0, 4 >= .04; c1: 2 >= .4 * 3, 0 < 1.2, .1 < 1.6
    merged = aggregate("consensus", [3.0, 3.0, 4.0], [2.0, 0.0, 0.1], scale=1.0)
    torch.testing.assert_close(merged, torch.tensor([5.0, 0.0, 0.0]))
    every = aggregate("consensus", [3.0, 3.0, 4.0], [2.0, 0.0, 0.1], scale=0.5, min_clients=1)
    torch.testing.assert_close(every, torch.tensor([2.5, 1.5, 2.05]))


def test_fisher_weighs_by_information_and_examples():
    extras = [{"fisher": {"w": torch.tensor([3.0, 0.0])}}, {"fisher": {"w": torch.tensor([1.0, 0.0])}}]
    # (1 * 3 * 1 + 3 * 1 * 5) / (3 + 3) = 3; nobody knows the second: (1 * 2 + 3 * 6) / 4 = 5
    merged = aggregate("fisher", [1.0, 2.0], [5.0, 6.0], extras=extras, examples=[1, 3])
    torch.testing.assert_close(merged, torch.tensor([3.0, 5.0]))


def test_fisher_refuses_negative_and_missing_information():
    bad = [{"fisher": {"w": torch.tensor([-1.0])}}]
    with pytest.raises(ClientError, match=r"client 'c0': extras\['fisher'\]\['w'\] must be non-negative"):
        aggregate("fisher", [1.0], extras=bad)
    with pytest.raises(ClientError, match=r"client 'c0': extras\['fisher'\] must have tensor 'w'"):
        aggregate("fisher", [1.0], extras=[{"fisher": {}}])
    with pytest.raises(ClientError, match=r"extras\['fisher'\]\['w'\] must be finite"):
        aggregate("fisher", [1.0], extras=[{"fisher": {"w": torch.tensor([float("nan")])}}])


def test_regmean_solves_the_regression():
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, 4, generator=rng, dtype=torch.float64) for _ in range(3)]
    weights = [torch.randn(3, 4, generator=rng) for _ in range(3)]
    extras = [{"gram": {"w": x.T @ x}} for x in inputs]
    merged = aggregate("regmean", *[w.tolist() for w in weights], extras=extras, shrink=1.0)
    # least squares: one W that fits every client's outputs on its own inputs
    stacked = torch.cat(inputs)
    outputs = torch.cat([x @ w.double().T for x, w in zip(inputs, weights, strict=True)])
    expected = torch.linalg.lstsq(stacked, outputs).solution.T
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)


def test_regmean_averages_where_no_input_went():
    gram = torch.diag(torch.tensor([1.0, 0.0]))
    merged = aggregate("regmean", [[1.0, 1.0]], [[3.0, 5.0]], extras=[{"gram": {"w": gram}}] * 2)
    torch.testing.assert_close(merged, torch.tensor([[2.0, 3.0]]))
    with pytest.raises(ClientError, match=r"extras\['gram'\]\['w'\] must have shape \(2, 2\), got \(1, 1\)"):
        aggregate("regmean", [[1.0, 1.0]], extras=[{"gram": {"w": torch.ones(1, 1)}}])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dare", {"drop_rate": 1.0}, r"aggregator.drop_rate must be in \[0, 1\), got 1.0"),
        ("dare", {"vote": "weighted"}, "aggregator.vote must be uniform where aggregator.merge is linear"),
        ("della", {"divisor": "weight"}, "aggregator.divisor must be count where aggregator.merge is linear"),
        ("dare", {"merge": "x"}, "aggregator.merge must be one of linear, ties, got 'x'"),
        ("della", {"density": 1.0}, r"aggregator.density must be in \(0, 1\), got 1.0"),
        ("della", {"density": 0.1, "window": 0.2}, r"aggregator.window must be in \[0, 0.2\) at density 0.1, got 0.2"),
        ("breadcrumbs", {"gamma": 1.0}, r"aggregator.gamma must be in \[0, 1\), got 1.0"),
        ("breadcrumbs", {"density": 0.0}, r"aggregator.density must be in \(0, 1\], got 0.0"),
        ("sce", {"density": 0.0}, r"aggregator.density must be in \(0, 1\], got 0.0"),
        ("consensus", {"min_clients": 0}, r"aggregator.min_clients must be >= 1, got 0"),
        ("consensus", {"threshold": 0.0}, r"aggregator.threshold must be > 0, got 0.0"),
        ("regmean", {"shrink": 2.0}, r"aggregator.shrink must be in \[0, 1\], got 2.0"),
        ("task_arithmetic", {"scale": 0.0}, r"aggregator.scale must be > 0, got 0.0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ConfigError, match=message):
        Aggregator.by_name(name)(**options)

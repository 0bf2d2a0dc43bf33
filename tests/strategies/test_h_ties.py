"""H-TIES: worked checks and Eqs 5-7, 10-14 on updates small enough to do by hand."""

import math

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.survey import Surveyor
from fedproxy.strategies.functional.similarity import (
    affinity_weights,
    cosine_matrix,
    heterogeneity,
    retention,
    with_equal_rows,
)
from fedproxy.strategies.functional.voting import ratio_vote_merge


def aggregate(*deltas, **options):
    updates = [ClientUpdate(f"c{i}", {"w": torch.tensor(delta)}) for i, delta in enumerate(deltas)]
    return Aggregator.by_name("h_ties")(**options).aggregate(updates)


def test_worked_check_of_the_paper_notes():
    # Delta = (2, 1, -1), w = (.5, .3, .2), no trimming, rho = 1.1: (1.0 + 0.3) / 0.8 = 1.625
    weights = torch.tensor([0.5, 0.3, 0.2])
    scaled = weights.unsqueeze(1) * torch.tensor([[2.0], [1.0], [-1.0]])
    merged = ratio_vote_merge(scaled, weights, rho=1.1, eps=1e-12)
    torch.testing.assert_close(merged, torch.tensor([1.625]))


@pytest.mark.parametrize("rho", [1.0, 1.1])
def test_equal_and_opposite_updates_give_zero(rho):
    assert aggregate([1.0, -3.0], [-1.0, 3.0], rho=rho).delta["w"].tolist() == [0.0, 0.0]


def test_no_sign_wins_below_the_ratio():
    # w = 1/2 each: masses .55 and .5, ratio 1.1; 1.2 is not reached, 1.05 is
    assert aggregate([1.1], [-1.0], rho=1.2).delta["w"].tolist() == [0.0]
    torch.testing.assert_close(aggregate([1.1], [-1.0], rho=1.05).delta["w"], torch.tensor([1.1]))


def test_a_light_winner_keeps_its_value():
    # the winner's weight is 1e-6 of the whole; the weighted mean over the winners is still its own value
    weights = torch.tensor([1e-6, 1.0 - 1e-6])
    scaled = weights.unsqueeze(1) * torch.tensor([[5e6], [-1.0]])
    torch.testing.assert_close(ratio_vote_merge(scaled, weights, rho=1.1, eps=1e-12), torch.tensor([5e6]))


def test_figures_of_orthogonal_and_parallel_clients():
    # c0 = c1 (cosine 1), c2 orthogonal: sums of |S| are 1, 1, 0; h = 1 - 1/2, 1 - 1/2, 1
    result = aggregate([1.0, 0.0], [2.0, 0.0], [0.0, 1.0], r0=0.9, delta=0.4)
    e = math.e
    assert result.diagnostics["weights"] == pytest.approx([e / (2 * e + 1), e / (2 * e + 1), 1 / (2 * e + 1)])
    assert result.diagnostics["heterogeneity"] == [0.5, 0.5, 1.0]
    assert result.diagnostics["retention"] == pytest.approx([0.9, 0.9, 0.5])
    assert result.diagnostics["cosine"] == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert result.diagnostics["update_norms"] == [1.0, 2.0, 1.0]


def test_absolute_similarity_favours_an_opposing_client_and_positive_does_not():
    cosine = cosine_matrix(torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]))
    torch.testing.assert_close(affinity_weights(cosine), torch.full((3,), 1 / 3, dtype=torch.float64))
    # positive: sums 1, 1, 0
    weights = affinity_weights(cosine, similarity="positive")
    torch.testing.assert_close(weights, torch.softmax(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), 0))


def test_equal_clients_get_equal_figures_to_the_bit():
    torch.manual_seed(0)
    for clients in (3, 4, 5, 8, 9):
        rows = torch.randn(clients, 1001)
        rows[-1] = rows[0]
        updates = [ClientUpdate(f"c{i}", {"w": row}) for i, row in enumerate(rows)]
        figures = Aggregator.by_name("h_ties")().aggregate(updates).diagnostics
        for figure in ("heterogeneity", "weights", "retention"):
            assert figures[figure][0] == figures[figure][-1], (clients, figure)


def test_products_of_equal_vectors_are_equal_wherever_a_matrix_product_put_them():
    # As a product may give it on another processor: rows 0 and 2 are the same vector, and differ in the last bits.
    gram = torch.tensor(
        [[4.0, 1.0, 4.0 + 1e-15], [1.0, 9.0, 1.0 + 2e-16], [4.0, 1.0 - 1e-16, 4.0]], dtype=torch.float64
    )
    assert with_equal_rows(gram, [[0, 2]]).tolist() == [[4.0, 1.0, 4.0], [1.0, 9.0, 1.0], [4.0, 1.0, 4.0]]


def test_clients_are_equal_only_where_all_tensors_are():
    # a, c and d agree on w, but d differs from them at the end of v; b and e agree on nothing with anybody
    w, v = torch.randn(3, 2000), torch.randn(3, 40)
    changed = v[0].clone()
    changed[-1] += 1
    rows = {"a": (w[0], v[0]), "b": (w[1], v[1]), "c": (w[0], v[0]), "d": (w[0], changed), "e": (w[2], v[1])}
    cohort = Cohort([ClientUpdate(name, {"v": second, "w": first}) for name, (first, second) in rows.items()])
    survey = Surveyor(cohort).run()
    assert [list(group) for group in survey.equals] == [[0, 2]]
    for gram in (survey.gram, survey.grams["w"]):
        assert torch.equal(gram[0, [1, 4]], gram[2, [1, 4]])
        assert torch.equal(gram, gram.T)
    assert torch.equal(survey.grams["w"][0], survey.grams["w"][3])


def test_parallel_clients_all_keep_r0():
    # the span of h is rounding noise, below 1e-12, so nobody is trimmed more
    base = torch.linspace(-1, 1, 999)
    result = aggregate(base.tolist(), (3 * base).tolist(), (0.7 * base).tolist(), r0=0.8, delta=0.5)
    assert set(result.diagnostics["retention"]) == {0.8}


def test_inner_products_that_decide_are_of_float64():
    # Four clients, each the next one's update turned by a quarter: all are as far from the others, and keep r0.
    start = 1 + torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    updates = [ClientUpdate(f"c{k}", {"w": start.roll(k << 14)}) for k in range(4)]

    def kept(**options):
        survey = Surveyor(Cohort(updates), **options).run()
        return retention(heterogeneity(survey.cosine), r0=1.0, delta=0.2).tolist()

    assert kept() == [1.0] * 4
    assert Aggregator.by_name("h_ties")().aggregate(updates).diagnostics["retention"] == [1.0] * 4
    # The rounding of float32 products tells them apart, and Eq (10) makes a fifth of the coordinates of it.
    assert min(kept(decides=False)) == pytest.approx(0.8)


def test_retention_is_clipped_and_falls_with_heterogeneity():
    spread = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(retention(spread, r0=1.0, delta=0.2), torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64))
    assert retention(spread, r0=0.5, delta=0.5).tolist() == pytest.approx([0.5, 0.25, 0.0])


def test_zero_update_has_cosine_zero_with_all():
    cosine = cosine_matrix(torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert cosine.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert heterogeneity(cosine).tolist() == [1.0, 1.0]


def test_conflict_follows_the_equation_and_its_option():
    # sign sums 2 - 0, 1 - 1, 0 (nobody moved), 1: C = 1 - 2/2, 1 - 0, 1 - 0, 1 - 1/2
    deltas = ([1.0, 1.0, 0.0, 0.0], [3.0, -1.0, 0.0, 2.0])
    assert aggregate(*deltas).conflict["w"].tolist() == [0.0, 1.0, 1.0, 0.5]
    assert aggregate(*deltas, ignore_unmoved=True).conflict["w"].tolist() == [0.0, 1.0, 0.0, 0.5]
    figures = aggregate(*deltas).diagnostics
    assert figures["conflict_mean"] == 0.625
    # |sign sum| / movers over the three moved coordinates: 1, 0, 1
    assert figures["sign_agreement"] == pytest.approx(2 / 3)


def test_one_client_returns_itself():
    result = aggregate([1.0, 0.0, -2.0], r0=0.5, delta=0.5)
    assert result.delta["w"].tolist() == [1.0, 0.0, -2.0]
    assert result.conflict["w"].tolist() == [0.0, 0.0, 0.0]
    assert result.diagnostics["weights"] == [1.0]
    assert result.diagnostics["retention"] == [1.0]
    assert result.diagnostics["heterogeneity"] == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.9}, "aggregator.rho must be >= 1, got 0.9"),
        ({"r0": 0.0}, r"aggregator.r0 must be in \(0, 1\], got 0.0"),
        ({"r0": 0.5, "delta": 0.6}, r"aggregator.delta must be in \[0, r0 = 0.5\], got 0.6"),
        ({"eps": 0.0}, "aggregator.eps must be > 0, got 0.0"),
        ({"similarity": "abs"}, "aggregator.similarity must be one of absolute, positive, got 'abs'"),
        ({"trim_scope": "x"}, "aggregator.trim_scope must be one of global, tensor, got 'x'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Aggregator.by_name("h_ties")(**options)

"""What every aggregator inherits: checks of the updates, weights, precision; `combine` is the one thing to write."""

from dataclasses import dataclass

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregation, Aggregator
from fedproxy.strategies.aggregators.base import MOST_COSINES


def client(name, values, **fields):
    return ClientUpdate(name, {"w": torch.as_tensor(values)}, **fields)


def fedavg(*updates, **options):
    return Aggregator.by_name("fedavg")(**options).aggregate(updates)


def test_weighting_by_examples_tokens_or_nothing():
    updates = (
        client("a", [1.0], num_examples=1, num_tokens=3),
        client("b", [5.0], num_examples=3, num_tokens=1),
    )
    assert fedavg(*updates).delta["w"].item() == 4.0  # (1 * 1 + 3 * 5) / 4
    assert fedavg(*updates, weighting="tokens").delta["w"].item() == 2.0  # (3 * 1 + 1 * 5) / 4
    assert fedavg(*updates, weighting="uniform").delta["w"].item() == 3.0
    assert fedavg(*updates).diagnostics["weights"] == [0.25, 0.75]


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])  # squares of the others are no float32
def test_figures_that_decide_nothing_are_right_to_five_digits(scale):
    rows = scale * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    rows[3] = rows[0] + 0.1 * rows[1]
    figures = fedavg(*(client(f"{k}", row) for k, row in enumerate(rows)), weighting="uniform").diagnostics
    exact = rows.double()
    norms = exact.norm(dim=1)
    assert figures["update_norms"] == pytest.approx(norms.tolist(), rel=1e-5)
    cosines = torch.tensor(figures["cosine"], dtype=torch.float64)
    torch.testing.assert_close(cosines, exact @ exact.T / torch.outer(norms, norms), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clients", [MOST_COSINES, MOST_COSINES + 1])
def test_cosines_of_many_clients_are_no_figure(clients):
    figures = fedavg(*(client(f"{k:03}", torch.ones(2)) for k in range(clients))).diagnostics
    assert (figures["cosine"] is None) == (clients > MOST_COSINES)
    assert len(figures["heterogeneity"]) == clients


def test_bfloat16_is_averaged_in_float32():
    # 256 clients of 1 + i/128: a bfloat16 running mean is about 2 % off; rounding once gives bfloat16(1.99609375) = 2
    values = [torch.full((2,), 1 + i / 128, dtype=torch.bfloat16) for i in range(256)]
    merged = fedavg(*(client(f"{i:03d}", value) for i, value in enumerate(values))).delta["w"]
    assert merged.dtype == torch.bfloat16
    exact = torch.stack(values).double().mean(0).to(torch.bfloat16)
    assert merged.tolist() == exact.tolist()


def test_scalars_and_empty_tensors_keep_their_shape():
    updates = [ClientUpdate(c, {"s": torch.tensor(2.0), "e": torch.empty(0, 3)}) for c in "ab"]
    for rule in ("fedavg", "ties", "h_ties"):
        delta = Aggregator.by_name(rule)().aggregate(updates).delta
        assert delta["s"].shape == ()
        assert delta["e"].shape == (0, 3)


def test_a_subclass_needs_combine_alone():
    seen = []

    @dataclass(frozen=True)
    class Largest(Aggregator):
        def combine(self, deltas, weights):
            seen.append((deltas.shape, weights.shape, deltas.dtype))
            return deltas.amax(dim=0)

    merged = Largest().aggregate([client("a", [[1.0, 2.0]]), client("b", [[3.0, -1.0]])])
    assert merged.delta["w"].tolist() == [[3.0, 2.0]]
    assert seen == [((2, 1, 2), (2, 1, 1), torch.float32)]


def test_client_order_does_not_matter():
    updates = [client(name, value) for name, value in (("b", [0.1]), ("a", [0.2]), ("c", [0.3]))]
    assert torch.equal(fedavg(*updates).delta["w"], fedavg(*updates[::-1]).delta["w"])
    # in the order of a, b, c
    assert fedavg(*updates).diagnostics["update_norms"] == pytest.approx([0.2, 0.1, 0.3])


def test_local_only_returns_its_client_and_refuses_two():
    rule = Aggregator.by_name("none")()
    assert rule.aggregate([client("a", [1.5])]).delta["w"].tolist() == [1.5]
    with pytest.raises(ConfigError, match="'none' does not merge clients, got 2 updates"):
        rule.aggregate([client("a", [1.0]), client("b", [1.0])])


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([], "at least one client update, got 0"),
        ([client("a", [1.0]), client("a", [1.0])], "client 'a' sent two updates"),
        ([client("a", [1.0]), ClientUpdate("b", {"v": torch.ones(1)})], "client 'b' must send the same tensors .* 'v'"),
        (
            [client("a", [1.0]), client("b", [1.0, 2.0])],
            r"client 'b': tensor 'w' must be float32 \(1,\) .* got float32 \(2,\)",
        ),
        ([client("a", [1.0]), client("b", [1])], "client 'b': tensor 'w' must be .* got int64"),
        ([client("a", [1.0]), client("b", [float("nan")])], "client 'b': tensor 'w' must be finite"),
        ([client("a", [-float("inf")]), client("b", [1.0])], "client 'a': tensor 'w' must be finite"),
        ([client("a", [1.0], num_examples=0)], "client 'a' must report num_examples > 0 .* got 0"),
    ],
)
def test_faulty_updates_are_named(updates, message):
    with pytest.raises(ClientError, match=message):
        fedavg(*updates)


def test_unknown_weighting_and_rule_are_refused():
    with pytest.raises(ConfigError, match=r"aggregator.weighting must be one of examples, tokens, uniform, got 'size'"):
        Aggregator.by_name("fedavg")(weighting="size")
    with pytest.raises(ConfigError, match="unknown aggregator 'fedavgg'; did you mean 'fedavg'"):
        Aggregator.by_name("fedavgg")


def test_conflict_by_layer_is_the_mean_over_a_blocks_coordinates():
    conflict = {
        "model.layers.2.q.lora_A.weight": torch.tensor([[1.0, 1.0, 0.0]]),
        "model.layers.2.q.lora_B.weight": torch.tensor([[0.5]]),
        "model.layers.10.mlp.lora_A.weight": torch.tensor([0.25]),
        "lm_head.lora_A.weight": torch.tensor([1.0]),
    }
    by_layer = Aggregation({}, conflict=conflict).conflict_by_layer()
    # block 2: (1 + 1 + 0 + 0.5) / 4; blocks come in their order, the head is in none
    assert list(by_layer.items()) == [("2", 0.625), ("10", 0.25)]
    assert Aggregation({}).conflict_by_layer() == {}

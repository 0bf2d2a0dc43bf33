"""Product space: any rule on s B A, against the same rule on dense matrices."""

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.aggregators.base import Plan
from fedproxy.strategies.aggregators.product import aggregate_products
from fedproxy.strategies.functional.lora import best_factors, product_space
from fedproxy.strategies.functional.lowrank import refactor, refactor_dense

A, B = "m.lora_A.weight", "m.lora_B.weight"
OUT, IN, RANK, SCALING, CLIENTS = 6, 5, 2, 2.0, 5


def case(ranks=(RANK,) * CLIENTS):
    rng = torch.Generator().manual_seed(0)
    state = {
        A: torch.randn(RANK, IN, generator=rng),
        B: torch.randn(OUT, RANK, generator=rng),
        "norm": torch.randn(4, generator=rng),
    }
    updates = [
        ClientUpdate(
            f"c{k}",
            {
                A: torch.randn(rank, IN, generator=rng),
                B: torch.randn(OUT, rank, generator=rng),
                "norm": torch.randn(4, generator=rng),
            },
            num_examples=k + 1,
        )
        for k, rank in enumerate(ranks)
    ]
    return state, updates, RoundContext(state=state, scaling=SCALING)


def dense_updates(state, updates):
    start = state[B].double() @ state[A].double()
    dense = []
    for update in updates:
        rank = update.delta[A].shape[0]
        b, a = (state[B][:, :rank] + update.delta[B]).double(), (state[A][:rank] + update.delta[A]).double()
        kept = state[B][:, :rank].double() @ state[A][:rank].double()
        change = SCALING * (b @ a - (start if rank == RANK else kept))
        dense.append(
            ClientUpdate(update.client_id, {"m": change.float(), "norm": update.delta["norm"]}, update.num_examples)
        )
    return dense


def best_product(state, dense):
    b, a = product_space((state[B].double(), state[A].double()), dense.delta["m"].double(), scaling=SCALING)
    return b @ a


ANY = [n for n in Aggregator.names() if Aggregator.by_name(n).space == "any" and Aggregator.by_name(n).aggregates]


@pytest.mark.parametrize("name", [n for n in ANY if not Aggregator.by_name(n).needs_extras and n != "bulyan"])
def test_every_rule_equals_itself_on_dense_products(name):
    state, updates, context = case()
    rule = Aggregator.by_name(name)()
    result = aggregate_products(rule, updates, None, context)
    dense = rule.aggregate(dense_updates(state, updates), None, context)
    new = {key: (state[key] + result.delta[key]).double() for key in state}
    torch.testing.assert_close(new[B] @ new[A], best_product(state, dense), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(result.delta["norm"], dense.delta["norm"], rtol=1e-4, atol=1e-5)
    for figure in ("update_norms", "heterogeneity"):
        assert result.diagnostics[figure] == pytest.approx(dense.diagnostics[figure], rel=1e-4, abs=1e-6)
    # the conflict map is that of the factors, which the regularizer acts on
    assert {key: tensor.shape for key, tensor in result.conflict.items()} == {k: t.shape for k, t in state.items()}


def test_mixed_ranks_in_product_space():
    state, updates, context = case(ranks=(2, 1, 2, 1, 2))
    rule = Aggregator.by_name("fedavg")()
    result = aggregate_products(rule, updates, None, context)
    dense = rule.aggregate(dense_updates(state, updates))
    new = {key: (state[key] + result.delta[key]).double() for key in state}
    torch.testing.assert_close(new[B] @ new[A], best_product(state, dense), rtol=1e-4, atol=2e-4)
    assert result.conflict is None


def test_exact_rules_are_applied_as_they_are():
    _, updates, context = case()
    rule = Aggregator.by_name("flexlora")()
    one, other = aggregate_products(rule, updates, None, context), rule.aggregate(updates, None, context)
    assert torch.equal(one.delta[B], other.delta[B])


def test_dense_refactoring_is_the_truncated_svd():
    for shape in ((7, 4), (4, 7)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        b, a = refactor_dense(matrix, RANK)
        best_b, best_a = best_factors(matrix, RANK)
        torch.testing.assert_close(b @ a, best_b @ best_a)
        by_qr = refactor((matrix, torch.eye(shape[1], dtype=torch.float64)), RANK)
        torch.testing.assert_close(by_qr[0] @ by_qr[1], b @ a)
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_a_client_that_did_not_move_has_a_length_of_nothing():
    # Factors of its change used to cancel in sums alone: rounding made the length -1e-17, by which pcgrad divided.
    rng = torch.Generator().manual_seed(0)
    shapes = {A: (4, 30), B: (20, 4)}
    state = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for _ in range(3):
        updates = [
            ClientUpdate(f"c{k}", {n: torch.randn(s, generator=rng) * (k not in (1, 3)) for n, s in shapes.items()})
            for k in range(CLIENTS)
        ]
        merged = aggregate_products(Aggregator.by_name("pcgrad")(), updates, None, RoundContext(state=state))
        assert merged.diagnostics["update_norms"][1] == merged.diagnostics["update_norms"][3] == 0.0
        assert all(tensor.isfinite().all() for tensor in merged.delta.values())


@pytest.mark.parametrize("name", ["fedavg", "median", "flexlora"])
def test_a_product_of_nothing_leaves_a_as_it_is(name):
    # As in a first round at rate 0: with A = B = 0 no gradient would ever move the pair again.
    state = {A: torch.randn(RANK, IN), B: torch.zeros(OUT, RANK)}
    updates = [ClientUpdate(f"c{k}", {n: torch.zeros_like(t) for n, t in state.items()}) for k in range(3)]
    merged = aggregate_products(Aggregator.by_name(name)(), updates, None, RoundContext(state=state))
    assert not any(tensor.any() for tensor in merged.delta.values())


@pytest.mark.parametrize("name", ["fedavg", "flexlora"])
def test_the_bits_do_not_depend_on_how_many_threads_there_are(name):
    rng, shapes = torch.Generator().manual_seed(1), {A: (8, 3000), B: (2500, 8)}
    state, *deltas = ({n: torch.randn(s, generator=rng) for n, s in shapes.items()} for _ in range(4))
    updates, before = [ClientUpdate(f"c{k}", delta) for k, delta in enumerate(deltas)], torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        merged = aggregate_products(Aggregator.by_name(name)(), updates, None, RoundContext(state=state))
        found.append((merged.delta[A].tolist(), merged.delta[B].tolist(), merged.diagnostics))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_what_cannot_be_done_is_refused():
    _, updates, context = case()
    with pytest.raises(ConfigError, match="aggregator 'ffa_lora' works on LoRA factors and cannot merge products"):
        aggregate_products(Aggregator.by_name("ffa_lora")(), updates, None, context)
    with pytest.raises(ConfigError, match="product needs the broadcast state, got none"):
        aggregate_products(Aggregator.by_name("fedavg")(), updates)


def test_a_rule_of_ones_own_without_coefficients_is_one_line():
    class Silent(Aggregator, name="silent"):
        combines_by_gram = True

        def plan(self, survey, cohort, memory, context):
            return Plan(lambda block: block.values[0])

    _, updates, context = case()
    with pytest.raises(ConfigError, match=r"aggregator.name=silent: a rule with combines_by_gram .* set .* to False$"):
        aggregate_products(Silent(), updates, None, context)

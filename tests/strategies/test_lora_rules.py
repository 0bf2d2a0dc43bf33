"""LoRA-exact rules against dense products."""

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.functional.lowrank import factor_mean_error, mean_residual, refactor, stack_pairs

A, B = "m.lora_A.weight", "m.lora_B.weight"
OUT, IN, RANK = 6, 5, 3
SHARES = (0.25, 0.75)


def start_state(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {A: torch.randn(RANK, IN, generator=rng), B: torch.randn(OUT, RANK, generator=rng)}


def make_updates(ranks=(RANK, RANK), seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            f"c{k}",
            {A: torch.randn(rank, IN, generator=rng), B: torch.randn(OUT, rank, generator=rng)},
            num_examples=2 * k + 1,
        )
        for k, rank in enumerate(ranks)
    ]


def trained(update, state):
    rank = update.delta[A].shape[0]
    return (state[B][:, :rank] + update.delta[B]).double(), (state[A][:rank] + update.delta[A]).double()


def product_mean(updates, state):
    products = [torch.matmul(*trained(update, state)) for update in updates]
    return sum(share * product for share, product in zip(SHARES, products, strict=True))


def run(name, updates, state, **context):
    result = Aggregator.by_name(name)().aggregate(updates, None, RoundContext(state=state, **context))
    new = {key: (state[key] + result.delta[key]).double() for key in state}
    return result, new


def test_fedex_mean_plus_residual_is_the_product_mean():
    state, updates = start_state(), make_updates()
    result, new = run("fedex_lora", updates, state)
    exact = product_mean(updates, state)
    assert not torch.allclose(new[B] @ new[A], exact, atol=1e-2)
    assert result.base_change[A].shape == (RANK, IN)  # (K - 1) r
    total = new[B] @ new[A] + result.base_change[B].double() @ result.base_change[A].double()
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-5)


def test_flora_stacks_into_the_base_and_resets_the_adapter():
    state, updates = start_state(), make_updates(ranks=(RANK, 2))
    result, new = run("flora", updates, state)
    assert float((new[B] @ new[A]).abs().max()) < 1e-6
    torch.testing.assert_close(new[A], state[A].double())
    stacked = result.base_change[B].double() @ result.base_change[A].double()
    assert result.base_change[A].shape == (RANK + 2, IN)
    torch.testing.assert_close(stacked, product_mean(updates, state), rtol=1e-5, atol=1e-5)


def test_flexlora_is_the_best_approximation_of_the_product_mean():
    state, updates = start_state(), make_updates(ranks=(RANK, 2))
    _, new = run("flexlora", updates, state)
    u, s, vh = torch.linalg.svd(product_mean(updates, state))
    best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK]
    torch.testing.assert_close(new[B] @ new[A], best, rtol=1e-4, atol=1e-4)
    # both factors carry S^(1/2)
    torch.testing.assert_close(new[B].norm(dim=0).square(), s[:RANK], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new[A].norm(dim=1).square(), s[:RANK], rtol=1e-4, atol=1e-4)


def test_exact_rules_report_the_geometry_of_products():
    state, updates = start_state(), make_updates()
    changes = [torch.matmul(*trained(update, state)) - state[B].double() @ state[A].double() for update in updates]
    result, _ = run("flexlora", updates, state, scaling=2.0)
    norms = [2.0 * float(change.norm()) for change in changes]
    assert result.diagnostics["update_norms"] == pytest.approx(norms, rel=1e-6)
    cosine = float((changes[0] * changes[1]).sum() / changes[0].norm() / changes[1].norm())
    assert result.diagnostics["cosine"][0][1] == pytest.approx(cosine, rel=1e-6)


def test_ffa_lora_leaves_a_and_is_exact():
    state, updates = start_state(), make_updates()
    result, _ = run("ffa_lora", updates, state)
    assert float(result.delta[A].abs().max()) == 0.0
    torch.testing.assert_close(result.delta[B], sum(s * u.delta[B] for s, u in zip(SHARES, updates, strict=True)))
    rule = Aggregator.by_name("ffa_lora")()
    assert (rule.trains(A, 1), rule.trains(B, 1), rule.trains("norm", 1)) == (False, True, True)


def test_rolora_alternates():
    state, updates = start_state(), make_updates()
    rule = Aggregator.by_name("rolora")()
    for number, moves, rests in ((1, B, A), (2, A, B), (3, B, A)):
        delta = rule.aggregate(updates, None, RoundContext(round=number, state=state)).delta
        assert float(delta[rests].abs().max()) == 0.0
        assert float(delta[moves].abs().max()) > 0.0
        assert (rule.trains(moves, number), rule.trains(rests, number)) == (True, False)


def test_fedsa_lora_shares_a_alone():
    rule = Aggregator.by_name("fedsa_lora")()
    assert (rule.shares(A), rule.shares(B), rule.shares("norm")) == (True, False, True)
    delta = rule.aggregate(make_updates()).delta
    torch.testing.assert_close(delta[B], sum(s * u.delta[B] for s, u in zip(SHARES, make_updates(), strict=True)))


def test_refactor_of_a_low_rank_product_is_exact_and_fills_up():
    (b, a) = stack_pairs([trained(update, start_state()) for update in make_updates(ranks=(1, 1))], [0.5, 0.5])
    new_b, new_a = refactor((b, a), 4)
    assert new_b.shape == (OUT, 4)
    assert new_a.shape == (4, IN)
    torch.testing.assert_close(new_b @ new_a, b @ a)
    assert float(new_b[:, 2:].abs().max()) < 1e-6


def test_residual_of_one_client_is_empty_and_of_three_is_exact():
    state = start_state()
    pairs = [trained(update, state) for update in make_updates(ranks=(RANK,) * 3)]
    assert mean_residual(pairs[:1], [1.0])[0].shape == (OUT, 0)
    shares = [0.2, 0.3, 0.5]
    b, a = mean_residual(pairs, shares)
    assert a.shape == (2 * RANK, IN)
    exact = sum(p * pair[0] @ pair[1] for p, pair in zip(shares, pairs, strict=True))
    mean = [sum(p * pair[i] for p, pair in zip(shares, pairs, strict=True)) for i in range(2)]
    torch.testing.assert_close(b @ a, exact - mean[0] @ mean[1])
    states = [{B: pair[0], A: pair[1]} for pair in pairs]
    error = float((b @ a).norm() / exact.norm())
    assert factor_mean_error(states, shares, 1.0) == pytest.approx(error, rel=1e-9)


def test_a_rank_above_the_servers_or_half_a_pair_is_an_error():
    state = start_state()
    with pytest.raises(ClientError, match=r"client 'c0': LoRA factors of 'm' must fit .* got \(6, 4\) and \(4, 5\)"):
        run("flexlora", make_updates(ranks=(4, 3)), state)
    half = [ClientUpdate("c0", {A: torch.zeros(RANK, IN)})]
    with pytest.raises(ClientError, match=r"client 'c0' must send 'm.lora_B.weight'"):
        run("flexlora", half, state)

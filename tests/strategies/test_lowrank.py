"""Low-rank arithmetic against the dense products it avoids."""

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.strategies.functional.lowrank import factor_mean_error, product_gram


def pairs(seed, clients, out=7, rank=2, inputs=5):
    torch.manual_seed(seed)
    return [(torch.randn(out, rank), torch.randn(rank, inputs)) for _ in range(clients)]


def states(*modules):
    """One list of (B, A) pairs per module -> one PEFT-named state per client."""
    clients = zip(*modules, strict=True)
    return [
        {f"m{i}.lora_{x}.weight": t for i, pair in enumerate(client) for x, t in zip("BA", pair, strict=True)}
        for client in clients
    ]


def test_product_gram_equals_the_dense_one():
    chosen = pairs(0, 4)
    dense = torch.stack([(b.double() @ a.double()).flatten() for b, a in chosen])
    gram = product_gram(chosen)
    torch.testing.assert_close(gram, dense @ dense.T)
    assert torch.equal(gram, gram.T)


def test_factor_mean_error_equals_the_dense_one():
    modules = [pairs(1, 3), pairs(2, 3, out=4, rank=3, inputs=6)]
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    missed = total = 0.0
    for module in modules:
        exact = sum(p * b.double() @ a.double() for p, (b, a) in zip(weights, module, strict=True))
        b_mean = sum(p * b.double() for p, (b, _) in zip(weights, module, strict=True))
        a_mean = sum(p * a.double() for p, (_, a) in zip(weights, module, strict=True))
        missed += float((exact - b_mean @ a_mean).square().sum())
        total += float(exact.square().sum())
    expected = (missed / total) ** 0.5
    assert expected > 0.1
    assert factor_mean_error(states(*modules), weights, 2.0) == pytest.approx(expected, rel=1e-12)
    assert factor_mean_error(states(*modules), [5, 3, 2], 2.0) == pytest.approx(expected, rel=1e-12)


def test_factor_mean_error_by_hand():
    # rank 1, 1 x 1: products 1 and 9, mean 5; factor means 2 * 2 = 4; error 1/5
    clients = [(torch.tensor([[v]]), torch.tensor([[v]])) for v in (1.0, 3.0)]
    assert factor_mean_error(states(clients), [1, 1], 1.0) == pytest.approx(0.2)


def test_factor_mean_error_is_zero_where_one_factor_is_shared():
    (b0, a), (b1, _) = pairs(3, 2)
    assert factor_mean_error(states([(b0, a), (b1, a)]), [1, 2], 2.0) == pytest.approx(0.0, abs=1e-12)
    assert factor_mean_error([{}, {}], [1, 1], 2.0) == 0.0
    assert factor_mean_error(states([(0 * b0, a), (0 * b1, a)]), [1, 1], 2.0) == 0.0


def test_half_a_pair_is_an_error():
    with pytest.raises(ClientError, match=r"LoRA module 'm' must have both lora_A.weight and lora_B.weight"):
        factor_mean_error([{"m.lora_A.weight": torch.ones(1, 1)}], [1], 1.0)

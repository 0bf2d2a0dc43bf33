"""Regularizers: values by hand, and the fused gradient against autograd of the loss."""

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.strategies.regularizers import Regularizer

ANCHOR = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}
CONFLICT = {"a": torch.tensor([0.5, 0.0]), "b": torch.tensor([[1.0]])}


def parameters():
    return {
        "a": torch.nn.Parameter(torch.tensor([3.0, 5.0])),  # moved by 2 and 3
        "b": torch.nn.Parameter(torch.tensor([[-1.0]])),  # moved by -1
    }


def test_proximal_is_half_mu_times_the_squared_distance():
    loss = Regularizer.by_name("proximal")(strength=0.1).loss(parameters(), ANCHOR, None)
    assert loss.item() == pytest.approx(0.05 * (4 + 9 + 1))
    assert loss.shape == ()


def test_conflict_is_the_weighted_sum_without_one_half():
    rule = Regularizer.by_name("conflict")(strength=10.0)
    params = parameters()
    loss = rule.loss(params, ANCHOR, CONFLICT)
    assert loss.item() == pytest.approx(10 * (0.5 * 4 + 0 * 9 + 1 * 1))
    loss.backward()
    # 2 lambda C (phi - phi^t)
    assert params["a"].grad.tolist() == [20.0, 0.0]
    assert params["b"].grad.tolist() == [[-20.0]]


def test_conflict_is_zero_in_the_first_round():
    params = parameters()
    rule = Regularizer.by_name("conflict")(strength=10.0)
    assert rule.loss(params, ANCHOR, None).item() == 0.0
    assert rule.add_gradient(params, ANCHOR, None).item() == 0.0
    assert params["a"].grad is None


def test_none_touches_nothing():
    rule = Regularizer.by_name("none")()
    assert rule.loss({}, {}, None).item() == 0.0
    assert rule.add_gradient(parameters(), {}, None).item() == 0.0


@pytest.mark.parametrize("name", ["proximal", "conflict"])
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_gradient_equals_autograd_of_the_loss(name, present, dtype):
    torch.manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    values = {key: torch.randn(shape) for key, shape in shapes.items()}
    anchor = {key: torch.randn(shape) for key, shape in shapes.items()}
    conflict = {key: torch.rand(shape) for key, shape in shapes.items()}
    start = {key: torch.randn(shape) for key, shape in shapes.items()}
    rule = Regularizer.by_name(name)(strength=0.3)
    by_loss, by_hand = (
        {key: torch.nn.Parameter(value.to(dtype, copy=True)) for key, value in values.items()} for _ in range(2)
    )
    if present:
        for params in (by_loss, by_hand):
            for key, param in params.items():
                param.grad = start[key].to(dtype, copy=True)
    loss = rule.loss(by_loss, anchor, conflict)
    loss.backward()
    value = rule.add_gradient(by_hand, anchor, conflict)
    torch.testing.assert_close(value, loss.detach())
    assert not value.requires_grad
    for key in shapes:
        torch.testing.assert_close(by_hand[key].grad, by_loss[key].grad)


def test_which_regularizers_need_the_conflict_map():
    needs = {name: "conflict" in Regularizer.by_name(name).parts for name in ("none", "proximal", "conflict")}
    assert needs == {"none": False, "proximal": False, "conflict": True}


@pytest.mark.parametrize("name", ["proximal", "conflict"])
def test_a_missing_or_misshapen_anchor_is_an_error(name):
    rule = Regularizer.by_name(name)()
    for call in (rule.loss, rule.add_gradient):
        with pytest.raises(ClientError, match="parameter 'b' has no anchor"):
            call(parameters(), {"a": ANCHOR["a"]}, CONFLICT)
        with pytest.raises(ClientError, match=r"anchor of parameter 'a' must have shape \(2,\), got \(1,\)"):
            call(parameters(), {**ANCHOR, "a": torch.ones(1)}, CONFLICT)


@pytest.mark.parametrize("name", ["proximal", "conflict"])
def test_negative_strength_is_refused(name):
    with pytest.raises(ConfigError, match=r"regularizer.strength must be >= 0, got -1.0"):
        Regularizer.by_name(name)(strength=-1.0)

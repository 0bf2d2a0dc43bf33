"""Server optimizers against torch.optim and a plain NumPy loop of Reddi et al., Alg. 2."""

import numpy as np
import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.strategies.server_optimizers import ServerOptimizer

ROUNDS = 6


def deltas():
    rng = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(7, generator=rng) * 0.1, "s": torch.randn((), generator=rng)} for _ in range(ROUNDS)]


def start():
    return {"w": torch.linspace(-1, 1, 7), "s": torch.tensor(0.5)}


def run(name, **options):
    rule = ServerOptimizer.by_name(name)(**options)
    state, memory = start(), None
    for delta in deltas():
        state, memory = rule.step(state, delta, memory)
    return state, memory


def test_none_adds_the_update_and_keeps_the_dtype():
    state = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    new, memory = ServerOptimizer.by_name("none")().step(state, {"w": torch.tensor([0.5, -2.0])})
    assert new["w"].tolist() == [1.5, 0.0]
    assert new["w"].dtype == torch.bfloat16
    assert memory == {}
    assert state["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch_on_the_negative_update(nesterov):
    params = {name: torch.nn.Parameter(value.clone()) for name, value in start().items()}
    optimizer = torch.optim.SGD(params.values(), lr=0.7, momentum=0.9, nesterov=nesterov)
    for delta in deltas():
        for name, param in params.items():
            param.grad = -delta[name]
        optimizer.step()
    state, _ = run("sgd", lr=0.7, momentum=0.9, nesterov=nesterov)
    for name, param in params.items():
        torch.testing.assert_close(state[name], param.detach())


def second_moment(name, v, square):
    if name == "adagrad":
        return v + square
    if name == "adam":
        return 0.95 * v + 0.05 * square
    return v - 0.05 * square * np.sign(v - square)


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
@pytest.mark.parametrize("v0", [None, 0.0])
def test_adaptive_optimizers_equal_reddis_algorithm_in_numpy(name, v0):
    eta, beta1, tau = 0.1, 0.8, 0.01
    options = {"lr": eta, "beta1": beta1, "tau": tau, "v0": v0} | ({} if name == "adagrad" else {"beta2": 0.95})
    state, memory = run(name, **options)
    for key in ("w", "s"):
        x = start()[key].double().numpy()
        m, v = np.zeros_like(x), np.full_like(x, tau**2 if v0 is None else v0)
        for delta in deltas():
            d = delta[key].double().numpy()
            m = beta1 * m + (1 - beta1) * d
            v = second_moment(name, v, d**2)
            x = x + eta * m / (np.sqrt(v) + tau)
        torch.testing.assert_close(state[key].double(), torch.as_tensor(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(memory[f"v/{key}"].double(), torch.as_tensor(v), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ServerOptimizer.names())
def test_memory_goes_on_exactly_after_a_restart(name):
    rule = ServerOptimizer.by_name(name)()
    state, memory = start(), None
    for delta in deltas()[:3]:
        state, memory = rule.step(state, delta, memory)
    assert bool(memory) == rule.stateful
    saved = {key: value.clone() for key, value in memory.items()}
    for delta in deltas()[3:]:
        state, memory = ServerOptimizer.by_name(name)().step(state, delta, saved)
        saved = memory
    assert {key: value.tolist() for key, value in state.items()} == {k: v.tolist() for k, v in run(name)[0].items()}


@pytest.mark.parametrize("name", ServerOptimizer.names())
def test_what_rests_stays_and_keeps_its_moments(name):
    rule = ServerOptimizer.by_name(name)()
    state, memory = rule.step(start(), deltas()[0])
    after, kept = rule.step(state, {**deltas()[1], "w": torch.zeros(7)}, memory, resting=["w"])
    assert torch.equal(after["w"], state["w"])
    assert all(torch.equal(kept[key], memory[key]) for key in memory if key.endswith("/w"))
    assert torch.equal(after["s"], rule.step(state, deltas()[1], memory)[0]["s"])


def test_feddyn_counts_the_clients_that_sent_an_update():
    # one of two drawn clients of four is dropped: h = -alpha / 4 * the one update
    rule = ServerOptimizer.by_name("feddyn")(strength=0.5, share=0.5)
    _, memory = rule.taking(0.5).step({"x": torch.zeros(1)}, {"x": torch.tensor([2.0])})
    assert memory["h/x"].tolist() == [-0.25]


def test_other_tensors_than_the_states_are_refused():
    with pytest.raises(ClientError, match="the merged update must have the state's tensors, but 'v' is in only one"):
        ServerOptimizer.by_name("none")().step({"w": torch.ones(1)}, {"w": torch.ones(1), "v": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentum": 1.0}, r"server_optimizer.momentum must be in \[0, 1\), got 1.0"),
        ("sgd", {"lr": 0.0}, r"server_optimizer.lr must be > 0, got 0.0"),
        ("adam", {"beta2": 1.0}, r"server_optimizer.beta2 must be in \[0, 1\), got 1.0"),
        ("yogi", {"tau": 0.0}, r"server_optimizer.tau must be > 0, got 0.0"),
        ("adagrad", {"v0": -1.0}, r"server_optimizer.v0 must be >= 0 or null, got -1.0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ConfigError, match=message):
        ServerOptimizer.by_name(name)(**options)

"""SCAFFOLD and FedDyn on quadratics whose optimum is known: f_k(x) = a_k / 2 (x - b_k)^2, minimum sum a b / sum a."""

import pytest
import torch

from fedproxy.errors import ClientError, ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.server_optimizers import ServerOptimizer

CURVATURES, CENTRES = (1.0, 4.0, 0.5), (0.0, 1.0, 6.0)
OPTIMUM = (0.0 + 4.0 + 3.0) / 5.5
LR, STEPS = 0.1, 10


def federate(regularizer, server, rounds=150):
    """Plain full-gradient clients: what the client loop must do with the hooks."""
    rule = Aggregator.by_name("fedavg")(weighting="uniform")
    state, memory, shared = {"x": torch.zeros(1)}, None, {}
    own = [{} for _ in CENTRES]
    for _ in range(rounds):
        updates = []
        for k, (curvature, centre) in enumerate(zip(CURVATURES, CENTRES, strict=True)):
            params = {"x": torch.nn.Parameter(state["x"].clone())}
            pull = regularizer.pull(own[k], shared, state)
            for _ in range(STEPS):
                params["x"].grad = None
                (curvature / 2 * (params["x"] - centre) ** 2).sum().backward()
                regularizer.add_gradient(params, state, None, pull)
                params["x"].data -= LR * params["x"].grad
            delta = {"x": params["x"].detach() - state["x"]}
            own[k], upload = regularizer.finish(own[k], shared, delta, steps=STEPS, lr=LR)
            updates.append(ClientUpdate(f"c{k}", delta, extras={regularizer.name: upload}))
        uploads = [update.extras[regularizer.name] for update in updates]
        shared = regularizer.merge_shared(shared, uploads, clients=len(CENTRES))
        state, memory = server.step(state, rule.aggregate(updates).delta, memory)
    return state["x"].item()


def test_plain_averaging_misses_the_optimum():
    reached = federate(Regularizer.by_name("none")(), ServerOptimizer.by_name("none")())
    assert abs(reached - OPTIMUM) > 0.1


def test_scaffold_reaches_the_optimum():
    reached = federate(Regularizer.by_name("scaffold")(), ServerOptimizer.by_name("none")())
    assert reached == pytest.approx(OPTIMUM, abs=1e-4)


def test_feddyn_reaches_the_optimum():
    reached = federate(Regularizer.by_name("feddyn")(strength=0.5), ServerOptimizer.by_name("feddyn")(strength=0.5))
    assert reached == pytest.approx(OPTIMUM, abs=1e-3)


def test_scaffold_by_hand():
    rule = Regularizer.by_name("scaffold")()
    own, shared = {"x": torch.tensor([1.0])}, {"x": torch.tensor([0.25])}
    assert rule.pull(own, shared, {"x": torch.zeros(1)})["x"].tolist() == [-0.75]
    # c_k+ - c_k = -c - Delta / (steps lr) = -.25 - 2 / (4 * .5)
    new, upload = rule.finish(own, shared, {"x": torch.tensor([2.0])}, steps=4, lr=0.5)
    assert upload["x"].tolist() == [-1.25]
    assert new["x"].tolist() == [-0.25]
    # two of four clients: .25 + (-1.25 + .25) / 4
    merged = rule.merge_shared(shared, [upload, {"x": torch.tensor([0.25])}], clients=4)
    assert merged["x"].tolist() == [0.0]


def test_feddyn_by_hand():
    rule = Regularizer.by_name("feddyn")(strength=0.5)
    new, upload = rule.finish({"x": torch.tensor([1.0])}, {}, {"x": torch.tensor([2.0])}, steps=1, lr=1.0)
    assert new["x"].tolist() == [0.0]
    assert upload == {}
    state, memory = ServerOptimizer.by_name("feddyn")(strength=0.5, share=0.5).step(
        {"x": torch.zeros(1)}, {"x": torch.tensor([2.0])}
    )
    assert memory["h/x"].tolist() == [-0.5]  # -.5 * .5 * 2
    assert state["x"].tolist() == [3.0]  # 2 + .5 / .5


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_added_gradient_equals_autograd_of_the_loss(name):
    torch.manual_seed(0)
    rule = Regularizer.by_name(name)()
    anchor, own, shared = ({"a": torch.randn(3, 2), "b": torch.randn(())} for _ in range(3))
    pull = rule.pull(own, shared, anchor)
    by_loss, by_hand = ({key: torch.nn.Parameter(value + 0.5) for key, value in anchor.items()} for _ in range(2))
    loss = rule.loss(by_loss, anchor, None, pull)
    loss.backward()
    torch.testing.assert_close(rule.add_gradient(by_hand, anchor, None, pull), loss.detach())
    for key in anchor:
        torch.testing.assert_close(by_hand[key].grad, by_loss[key].grad)


def test_only_the_remembering_regularizers_keep_memory():
    keeps = {
        n: ("control_variates" in Regularizer.by_name(n).parts, Regularizer.by_name(n).keeps_shared_memory)
        for n in Regularizer.names()
    }
    assert keeps == {
        "none": (False, False),
        "proximal": (False, False),
        "conflict": (False, False),
        "scaffold": (True, True),
        "feddyn": (True, False),
    }


def test_faults_are_named():
    rule = Regularizer.by_name("scaffold")()
    params = {"x": torch.nn.Parameter(torch.ones(1))}
    with pytest.raises(ClientError, match="parameter 'x' has no correction"):
        rule.add_gradient(params, {"x": torch.ones(1)}, None, {})
    with pytest.raises(ConfigError, match=r"regularizer.strength must be > 0, got 0.0"):
        Regularizer.by_name("feddyn")(strength=0.0)
    with pytest.raises(ConfigError, match=r"server_optimizer.share must be in \(0, 1\], got 0.0"):
        ServerOptimizer.by_name("feddyn")(share=0.0)

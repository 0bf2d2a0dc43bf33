import importlib.util

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.modules.optimizers import Optimizer
from fedproxy.modules.trainer import make_trainer

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def stepped(name, steps=3, size=5000, **options):
    """Return a parameter after some steps of gradient 1, 2, 3, ... from zero, at rate 0.1 and decay 0.5."""
    parameter = torch.nn.Parameter(torch.ones(size))
    trainer = make_trainer({"accelerator": "cpu"})
    optimizer = Optimizer.by_name(name)(**options).make(trainer, [parameter], lr=0.1, weight_decay=0.5)
    for step in range(steps):
        parameter.grad = torch.full((size,), float(step + 1))
        optimizer.step()
    return parameter.detach(), optimizer


def test_sgd_takes_the_steps_that_its_formula_says():
    # w <- w - 0.1 (g + 0.5 w): 1 - 0.15 = 0.85; 0.85 - 0.1 (2 + 0.425) = 0.6075; 0.6075 - 0.1 (3 + 0.30375).
    assert stepped("sgd")[0][0].item() == pytest.approx(0.6075 - 0.330375, abs=1e-6)
    # With momentum 0.5 the buffer is b <- 0.5 b + g + 0.5 w: 1.5; 0.75 + 2.425 = 3.175; 1.5875 + 3 + 0.5 * 0.5325.
    wanted = 0.5325 - 0.1 * (0.5 * 3.175 + 3 + 0.26625)
    assert stepped("sgd", momentum=0.5)[0][0].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "copies"),
    [("adamw", {}, 2.0), ("sgd", {}, 0.0), ("sgd", {"momentum": 0.9}, 1.0)]
    + ([("adamw_8bit", {}, 0.5)] if HAS_BITSANDBYTES else []),
)
def test_the_state_is_as_large_as_plan_says(name, options, copies):
    size = 1_000_000
    _, optimizer = stepped(name, steps=1, size=size, **options)
    [state] = optimizer.state.values() or [{}]
    held = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))
    assert Optimizer.by_name(name)(**options).state_copies == pytest.approx(held / (4 * size), abs=0.02)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_eight_bits_step_nearly_as_thirty_two_do():
    Optimizer.by_name("adamw_8bit")().check("cpu", None)
    few, all_bits = stepped("adamw_8bit")[0], stepped("adamw")[0]
    torch.testing.assert_close(few, all_bits, rtol=0, atol=0.01)  # of a way of 0.4


def test_eight_bits_are_refused_where_they_cannot_be(monkeypatch):
    eight = Optimizer.by_name("adamw_8bit")()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^client\.optimizer\.name=adamw_8bit needs bitsandbytes: pip install .*"):
        eight.check("cpu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"cannot step what trainer\.strategy=fsdp spreads; use trainer"):
        eight.check("cpu", "fsdp")

    def without(name):
        raise OSError(f"{name}: no kernel library")

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"bitsandbytes cannot step parameters on cpu here; use client"):
        eight.check("cpu", None)


def test_momentum_has_its_range():
    with pytest.raises(ConfigError, match=r"client\.optimizer\.momentum must be in \[0, 1\), got 1"):
        Optimizer.by_name("sgd")(momentum=1.0)

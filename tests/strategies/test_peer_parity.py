"""Parity with independent implementations.

tests/golden/peers.json holds what mergekit and Flower compute; benchmarks/peers.py made it, versions are in the file.
PEFT is called directly.
"""

import json
from pathlib import Path

import pytest
import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.functional.sparse import keep_probabilities
from fedproxy.strategies.server_optimizers import ServerOptimizer

_PEERS = json.loads((Path(__file__).parents[1] / "golden" / "peers.json").read_text())
_CASES = [pytest.param(case, id=f"{case['peer']}-{case['rule']}-{i}") for i, case in enumerate(_PEERS["cases"])]


def updates():
    return [
        ClientUpdate(f"c{k}", {f"t{i}": torch.tensor(values) for i, values in enumerate(tensors)}, num_examples=n)
        for k, (tensors, n) in enumerate(zip(_PEERS["updates"], _PEERS["num_examples"], strict=True))
    ]


@pytest.mark.parametrize("case", _CASES)
def test_our_rule_with_their_options_equals_theirs(case):
    delta = Aggregator.by_name(case["rule"])(**case["options"]).aggregate(updates()).delta
    for i, expected in enumerate(case["expected"]):
        torch.testing.assert_close(delta[f"t{i}"], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_yogi_equals_flowers_when_v_starts_at_zero():
    (case,) = _PEERS["server_optimizers"]
    theirs = case["options"]
    options = {"lr": theirs["eta"], "beta1": theirs["beta_1"], "beta2": theirs["beta_2"], "tau": theirs["tau"]}
    rule = ServerOptimizer.by_name(case["rule"])(v0=0.0, **options)
    mean = Aggregator.by_name("fedavg")().aggregate(updates()).delta
    state, memory = {name: torch.zeros_like(value) for name, value in mean.items()}, None
    for factor, expected in zip(case["factors"], case["expected"], strict=True):
        state, memory = rule.step(state, {name: value * factor for name, value in mean.items()}, memory)
        for i, values in enumerate(expected):
            torch.testing.assert_close(state[f"t{i}"], torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_della_keeps_coordinates_with_mergekits_probabilities():
    # What is kept is rescaled otherwise: here by its own probability, as in the paper, there to the tensor's norm.
    case = _PEERS["keep_probabilities"]
    options = {"density": case["options"]["density"], "window": 2 * case["options"]["epsilon"]}
    for update, expected in zip(updates(), case["expected"], strict=True):
        for i, values in enumerate(expected):
            ours = keep_probabilities(update.delta[f"t{i}"].unsqueeze(0), **options)[0]
            torch.testing.assert_close(ours, torch.tensor(values), rtol=1e-5, atol=1e-6)


def test_the_stored_vectors_say_where_they_come_from():
    assert _PEERS["made_by"] == "benchmarks/peers.py"
    assert set(_PEERS["versions"]) == {"mergekit", "flwr", "torch"}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_pefts_with_its_options(density):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    given = updates()
    shares = torch.tensor([update.num_examples for update in given], dtype=torch.float32)
    shares = shares / shares.sum()
    delta = (
        Aggregator.by_name("ties")(density=density, trim_scope="tensor", divisor="weighted_count")
        .aggregate(given)
        .delta
    )
    for name in ("t0", "t1"):
        theirs = merge_utils.ties([update.delta[name] for update in given], shares, density)
        torch.testing.assert_close(delta[name], theirs, rtol=1e-5, atol=1e-6)


def test_dare_without_dropping_equals_pefts():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    given = updates()
    shares = torch.tensor([update.num_examples for update in given], dtype=torch.float32)
    shares = shares / shares.sum()
    delta = Aggregator.by_name("dare")(drop_rate=0.0).aggregate(given).delta
    for name in ("t0", "t1"):
        theirs = merge_utils.dare_linear([update.delta[name] for update in given], shares, 1.0)
        torch.testing.assert_close(delta[name], theirs, rtol=1e-5, atol=1e-6)

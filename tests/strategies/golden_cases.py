"""Reads tests/golden/aggregation.json: expected results computed apart from this package, in float64."""

import json
from pathlib import Path

import pytest
import torch

from fedproxy.protocol import ClientUpdate

_CASES = json.loads((Path(__file__).parents[1] / "golden" / "aggregation.json").read_text())["cases"]


def golden_cases(*rules):
    """Return the cases of these rules as pytest parameters."""
    chosen = [(i, case) for i, case in enumerate(_CASES) if case["rule"] in rules]
    assert {case["rule"] for _, case in chosen} == set(rules)
    return [pytest.param(case, id=f"{case['rule']}-{case['kind']}-{i}") for i, case in chosen]


def golden_updates(case):
    """Return the case's client updates, ids in the file's order."""
    return [
        ClientUpdate(
            f"client_{i:02d}",
            {name: torch.tensor(values, dtype=torch.float32) for name, values in client["delta"].items()},
            num_examples=client["num_examples"],
        )
        for i, client in enumerate(case["clients"])
    ]


def flatten(tensors):
    """Return all coordinates in sorted-name, row-major order as float64."""
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def assert_golden(actual, expected):
    """Check max |error| <= 1e-6 * max(1, max |expected|)."""
    want = torch.as_tensor(expected, dtype=torch.float64)
    error = (torch.as_tensor(actual, dtype=torch.float64) - want).abs().max()
    assert error <= 1e-6 * max(1.0, float(want.abs().max())), f"max |error| {error:.3g}"


def assert_golden_delta(aggregation, case):
    """Check the merged update of a golden case."""
    expected = {name: torch.tensor(values, dtype=torch.float64) for name, values in case["expected"].items()}
    assert {name: t.shape for name, t in aggregation.delta.items()} == {name: t.shape for name, t in expected.items()}
    assert_golden(flatten(aggregation.delta), flatten(expected))

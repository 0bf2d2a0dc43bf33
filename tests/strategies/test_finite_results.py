"""No rule hands on a result that is not finite: at 3e38 from all clients it is finite, or one line says whose it is."""

import re
from dataclasses import replace

import pytest
import torch

from fedproxy.errors import ClientError
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.aggregators.product import aggregate_products

from .test_aggregator_contract import MERGING, make_context, make_updates

MESSAGE = r"^aggregator.name={} gives NaN or infinity for tensor '.*' in round 7; lower client.lr or choose another .*"


def loud():
    """Every coordinate of every client at the end of float32, with signs of their own."""
    return [
        replace(update, delta={name: tensor.sign().mul(3e38) for name, tensor in update.delta.items()})
        for update in make_updates()
    ]


def outcome(merge):
    """What came of a merge: tensors, or the error."""
    try:
        merged = merge()
    except ClientError as error:
        return str(error)
    return {**merged.delta, **merged.memory, **{f"base {name}": t for name, t in merged.base_change.items()}}


def is_finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("name", MERGING)
def test_a_result_is_finite_or_refused_with_rule_and_round(name):
    got = outcome(lambda: Aggregator.by_name(name)().aggregate(loud(), None, make_context(round=7)))
    assert re.match(MESSAGE.format(name), got) if isinstance(got, str) else is_finite(got)


def test_some_rules_are_refused_and_some_are_not():
    context = make_context(round=7)
    got = {
        name: outcome(lambda name=name: Aggregator.by_name(name)().aggregate(loud(), None, context)) for name in MERGING
    }
    refused = {name for name, found in got.items() if isinstance(found, str)}
    assert "median" not in refused
    assert len(refused) >= 5


@pytest.mark.parametrize("name", ["fedavg", "ties", "median", "task_arithmetic"])
def test_merged_products_are_finite_or_refused(name):
    rule, context = Aggregator.by_name(name)(), make_context(round=7, scaling=2.0)
    got = outcome(lambda: aggregate_products(rule, loud(), None, context))
    assert "NaN or infinity" in got if isinstance(got, str) else is_finite(got)


def test_large_values_that_cancel_or_add_up_to_more_than_float32_pass():
    updates = [replace(update, delta={"x": torch.full((4,), 3e38)}) for update in make_updates(2)]
    merged = Aggregator.by_name("fedavg")(weighting="uniform").aggregate(updates, figures=False)
    assert merged.delta["x"].tolist() == torch.full((4,), 3e38).tolist()

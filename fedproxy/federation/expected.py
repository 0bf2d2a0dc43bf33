"""What the server knows of an update before it comes: rows that it dealt out, tensors that it asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedproxy.federation.statistics import NON_NEGATIVE, statistics_forms
from fedproxy.protocol import Tensors
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Group:
    """One group of an update's extras."""

    tensors: Tensors
    """Names, shapes and dtypes, on the meta device."""
    squares: bool = False
    """Sums of squares: the square root of the group's norm is in the units of an update, and is what is compared."""
    non_negative: bool = False
    """No value may be below zero."""


@dataclass(frozen=True)
class Expected:
    """What every update of a run must agree with, beside the broadcast that it answers."""

    rows: Mapping[str, int] | None = None
    """Rows that each client was dealt; None where the server does not know."""
    target_tokens: int | None = None
    """Most answer tokens of a row; None where the server does not know."""
    extras: Mapping[str, Group] = field(default_factory=dict)
    """Groups that every update carries; there may be no others."""


def expected_extras(regularizer: Regularizer, aggregator: Aggregator, model: TrainableModel) -> dict[str, Group]:
    """Return the extras that clients send with every update: the regularizer's part, and statistics of their rows.

    Args:
        regularizer: The clients' term; its part is found by finishing a round on ``model``'s own parameters.
        aggregator: The rule.
        model: The proxy with what is trained attached; its values play no part.
    """
    state = {name: parameter.detach() for name, parameter in model.parameters().items()}
    _, upload = regularizer.finish({}, {}, state, steps=1, lr=1.0)
    groups = {regularizer.name: Group({name: _form(tensor) for name, tensor in upload.items()})} if upload else {}
    for group, tensors in statistics_forms(aggregator.needs_extras, model).items():
        groups[group] = Group(tensors, squares=True, non_negative=group in NON_NEGATIVE)
    return groups


def _form(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")

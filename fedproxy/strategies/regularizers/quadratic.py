"""Quadratic pulls towards the broadcast state: FedProx' proximal term and FedProxy's conflict term."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.protocol import Tensors
from fedproxy.strategies.regularizers.base import Regularizer, add_to_gradients, inner, matching, moved_from, total


@dataclass(frozen=True)
class Proximal(Regularizer, name="proximal"):
    """mu / 2 ||phi - phi^t||^2 (FedProx, Li et al. 2020, arXiv 1812.06127)."""

    reference: ClassVar[str] = "Li et al. 2020 (FedProx), arXiv 1812.06127"
    coordinatewise: ClassVar[bool] = True

    strength: float = 0.01
    """mu, >= 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("strength", self.strength >= 0.0, ">= 0")

    def loss(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Return mu / 2 times the squared distance to the anchor."""
        squares = [
            (param.float() - start).square().sum()
            for param, start in zip(params.values(), matching(params, anchor, "anchor"), strict=True)
        ]
        return total(squares).mul(0.5 * self.strength)

    def add_gradient(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Add mu (phi - phi^t) to the gradients."""
        moved = moved_from(params, anchor)
        add_to_gradients(params, moved, self.strength)
        return inner(moved, moved).mul_(0.5 * self.strength)


@dataclass(frozen=True)
class Conflict(Regularizer, name="conflict"):
    """lambda sum_p C_p (phi_p - phi_p^t)^2 (FedProxy's PCR, Eqs 8-9): a sum without 1/2; C = 0 in the first round."""

    reference: ClassVar[str] = "Fan et al. 2026 (FedProxy), arXiv 2604.19015, Eqs 8-9"
    coordinatewise: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("conflict",)

    strength: float = 1e-5
    """lambda, >= 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("strength", self.strength >= 0.0, ">= 0")

    def loss(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Return lambda times the conflict-weighted squared distance to the anchor; zero without a conflict map."""
        if conflict is None:
            return torch.zeros(())
        starts, weights = matching(params, anchor, "anchor"), matching(params, conflict, "conflict")
        squares = [
            ((param.float() - start).square() * weight).sum()
            for param, start, weight in zip(params.values(), starts, weights, strict=True)
        ]
        return total(squares).mul(self.strength)

    def add_gradient(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Add 2 lambda C (phi - phi^t) to the gradients; nothing without a conflict map."""
        if conflict is None:
            return torch.zeros(())
        moved = moved_from(params, anchor)
        pulled = list(torch._foreach_mul(moved, matching(params, conflict, "conflict")))
        add_to_gradients(params, pulled, 2.0 * self.strength)
        return inner(moved, pulled).mul_(self.strength)

"""Client corrections that remember: SCAFFOLD's control variates and FedDyn's dynamic regularizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.protocol import Tensors
from fedproxy.strategies.regularizers.base import Regularizer, add_to_gradients, inner, matching, moved_from, total


@dataclass(frozen=True)
class Scaffold(Regularizer, name="scaffold"):
    """Control variates (Karimireddy et al. 2020, arXiv 1910.06378, Alg. 1, option II): gradient + c - c_k.

    After ``steps`` local steps of rate ``lr``: c_k+ = c_k - c - Delta_k / (steps lr); the server adds the mean over all
    N clients of c_k+ - c_k to c. Used with fedavg. Its assumption ends at plain SGD: under Adam the update over steps
    times lr is no gradient mean, so the variates only point in its direction.
    """

    reference: ClassVar[str] = "Karimireddy et al. 2020, arXiv 1910.06378, Alg. 1"
    coordinatewise: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("control_variates",)
    keeps_shared_memory: ClassVar[bool] = True

    def pull(self, own: Tensors, shared: Tensors, anchor: Tensors) -> dict[str, Tensor]:
        """Return c - c_k."""
        return {name: _get(shared, name, value) - _get(own, name, value) for name, value in anchor.items()}

    def loss(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Return <c - c_k, phi - phi^t>, whose gradient is the correction."""
        return linear_term(params, anchor, pull)

    def add_gradient(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Add c - c_k to the gradients."""
        return torch.zeros(()) if pull is None else _add_linear(params, moved_from(params, anchor), pull)

    def finish(
        self, own: Tensors, shared: Tensors, delta: Tensors, *, steps: int, lr: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return c_k+ and, for the server, c_k+ - c_k."""
        change = {name: -_get(shared, name, value) - value.float() / (steps * lr) for name, value in delta.items()}
        return {name: _get(own, name, value) + value for name, value in change.items()}, change

    def merge_shared(self, shared: Tensors, uploads: Sequence[Tensors], clients: int) -> dict[str, Tensor]:
        """Return c + sum of the changes / N."""
        return {
            name: _get(shared, name, uploads[0][name])
            + torch.stack([upload[name].float() for upload in uploads]).sum(dim=0) / clients
            for name in sorted(uploads[0])
        }


@dataclass(frozen=True)
class FedDyn(Regularizer, name="feddyn"):
    """Dynamic regularization (Acar et al. 2021, arXiv 2111.04263, Alg. 1): -<g_k, phi> + alpha / 2 ||phi - phi^t||^2.

    After training g_k <- g_k - alpha Delta_k. Used with fedavg (uniform weights) and the server optimizer ``feddyn`` of
    the same alpha.
    """

    reference: ClassVar[str] = "Acar et al. 2021, arXiv 2111.04263, Alg. 1"
    coordinatewise: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("control_variates",)
    partner: ClassVar[str] = "feddyn"

    strength: float = 0.01
    """alpha, > 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("strength", self.strength > 0.0, "> 0")

    def pull(self, own: Tensors, shared: Tensors, anchor: Tensors) -> dict[str, Tensor]:
        """Return -g_k."""
        return {name: -_get(own, name, value) for name, value in anchor.items()}

    def loss(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Return -<g_k, phi - phi^t> + alpha / 2 ||phi - phi^t||^2; constants are left out."""
        starts = matching(params, anchor, "anchor")
        squares = total([(p.float() - start).square().sum() for p, start in zip(params.values(), starts, strict=True)])
        return linear_term(params, anchor, pull) + 0.5 * self.strength * squares

    def add_gradient(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Add -g_k + alpha (phi - phi^t) to the gradients."""
        moved = moved_from(params, anchor)
        add_to_gradients(params, moved, self.strength)
        value = inner(moved, moved).mul_(0.5 * self.strength)
        return value if pull is None else value + _add_linear(params, moved, pull)

    def finish(
        self, own: Tensors, shared: Tensors, delta: Tensors, *, steps: int, lr: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return g_k - alpha Delta_k; the server needs nothing but the update."""
        return {n: _get(own, n, value) - self.strength * value.float() for n, value in delta.items()}, {}


def linear_term(params: Mapping[str, Tensor], anchor: Tensors, pull: Tensors | None) -> Tensor:
    """Return <pull, phi - phi^t>, whose gradient is ``pull``; 0 without one."""
    if pull is None:
        return torch.zeros(())
    starts, pulls = matching(params, anchor, "anchor"), matching(params, pull, "correction")
    return total(
        [((p.float() - start) * value).sum() for p, start, value in zip(params.values(), starts, pulls, strict=True)]
    )


def _add_linear(params: Mapping[str, Tensor], moved: list[Tensor], pull: Tensors) -> Tensor:
    pulls = matching(params, pull, "correction")
    add_to_gradients(params, pulls, 1.0)
    return inner(moved, pulls)


def _get(memory: Tensors, name: str, like: Tensor) -> Tensor:
    return memory[name].float() if name in memory else torch.zeros_like(like, dtype=torch.float32)

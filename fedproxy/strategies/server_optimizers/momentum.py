"""Stochastic gradient descent with momentum on the pseudo-gradient."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.server_optimizers.base import ServerOptimizer


@dataclass(frozen=True)
class SGD(ServerOptimizer, name="sgd"):
    """m <- beta m + Delta; phi <- phi + lr m (FedAvgM, Hsu et al. 2019, arXiv 1909.06335).

    Equal to ``torch.optim.SGD`` on the gradient -Delta; with ``nesterov`` the step is lr (Delta + beta m).
    """

    stateful: ClassVar[bool] = True
    reference: ClassVar[str] = "Hsu et al. 2019 (FedAvgM), arXiv 1909.06335"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    lr: float = 1.0
    """Server learning rate, > 0."""
    momentum: float = 0.9
    """beta, in [0, 1)."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("lr", self.lr > 0.0, "> 0")
        self.require("momentum", 0.0 <= self.momentum < 1.0, "in [0, 1)")

    def update(self, delta: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return lr times the momentum, and the momentum."""
        momentum = slots["momentum"] * self.momentum + delta if slots else delta.clone()
        step = delta + self.momentum * momentum if self.nesterov else momentum
        return self.lr * step, {"momentum": momentum}

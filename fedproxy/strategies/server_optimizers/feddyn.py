"""FedDyn's server half: the running correction that makes the clients' stationary points agree."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedproxy.strategies.server_optimizers.base import ServerOptimizer


@dataclass(frozen=True)
class FedDynServer(ServerOptimizer, name="feddyn"):
    """h <- h - alpha share Delta; phi <- phi + Delta - h / alpha (Acar et al. 2021, arXiv 2111.04263, Alg. 1).

    Delta is the plain mean of the round's updates (``fedavg`` with ``weighting: uniform``). A round in which clients
    are dropped has a smaller share, as they remember nothing of it either.
    """

    stateful: ClassVar[bool] = True
    reference: ClassVar[str] = "Acar et al. 2021, arXiv 2111.04263, Alg. 1"
    partner: ClassVar[str] = "feddyn"
    slots: ClassVar[tuple[str, ...]] = ("h",)

    strength: float = 0.01
    """alpha of the regularizer ``feddyn``, > 0."""
    share: float = 1.0
    """Share of all clients that a round takes, in (0, 1]."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("strength", self.strength > 0.0, "> 0")
        self.require("share", 0.0 < self.share <= 1.0, "in (0, 1]")

    def taking(self, present: float) -> Self:
        """Return the optimizer with the share of all clients that sent an update."""
        return replace(self, share=self.share * present)

    def update(self, delta: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Delta - h / alpha, and h."""
        h = (slots["h"] if slots else torch.zeros_like(delta)) - self.strength * self.share * delta
        return delta - h / self.strength, {"h": h}

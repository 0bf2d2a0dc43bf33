"""Adaptive server optimizers (Reddi et al. 2021, arXiv 2003.00295, Alg. 2), without bias correction as in the paper."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.strategies.server_optimizers.base import ServerOptimizer


@dataclass(frozen=True)
class AdaptiveOptimizer(ServerOptimizer):
    """m <- beta1 m + (1 - beta1) Delta; phi <- phi + lr m / (sqrt(v) + tau); a subclass says how v follows Delta^2."""

    stateful: ClassVar[bool] = True
    reference: ClassVar[str] = "Reddi et al. 2021, arXiv 2003.00295, Alg. 2"
    slots: ClassVar[tuple[str, ...]] = ("m", "v")

    lr: float = 0.01
    """Server learning rate eta, > 0."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    tau: float = 1e-3
    """Degree of adaptivity, > 0: added to sqrt(v)."""
    v0: float | None = None
    """Start of v, >= 0; None is tau^2, the least that the paper allows (Flower starts at 0)."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("lr", self.lr > 0.0, "> 0")
        self.require("beta1", 0.0 <= self.beta1 < 1.0, "in [0, 1)")
        self.require("tau", self.tau > 0.0, "> 0")
        self.require("v0", self.v0 is None or self.v0 >= 0.0, ">= 0 or null")

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the new v.

        Args:
            v: float32 (*shape), of the previous step.
            square: float32 (*shape), Delta^2.
        """
        raise NotImplementedError

    def update(self, delta: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return lr m / (sqrt(v) + tau), and both moments."""
        start = self.tau**2 if self.v0 is None else self.v0
        m = slots["m"] * self.beta1 + (1.0 - self.beta1) * delta if slots else (1.0 - self.beta1) * delta
        v = self.second_moment(slots["v"] if slots else torch.full_like(delta, start), delta.square())
        return self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}


@dataclass(frozen=True)
class Adagrad(AdaptiveOptimizer, name="adagrad"):
    """v <- v + Delta^2. The paper's FedAdagrad has beta1 = 0."""

    beta1: float = 0.0
    """Decay of the first moment, in [0, 1)."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v + Delta^2."""
        return v + square


@dataclass(frozen=True)
class Adam(AdaptiveOptimizer, name="adam"):
    """v <- beta2 v + (1 - beta2) Delta^2 (FedAdam); no bias correction (Flower adds one)."""

    beta2: float = 0.99
    """Decay of the second moment, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("beta2", 0.0 <= self.beta2 < 1.0, "in [0, 1)")

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return beta2 v + (1 - beta2) Delta^2."""
        return self.beta2 * v + (1.0 - self.beta2) * square


@dataclass(frozen=True)
class Yogi(AdaptiveOptimizer, name="yogi"):
    """v <- v - (1 - beta2) Delta^2 sign(v - Delta^2) (FedYogi)."""

    beta2: float = 0.99
    """Decay of the second moment, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("beta2", 0.0 <= self.beta2 < 1.0, "in [0, 1)")

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v - (1 - beta2) Delta^2 sign(v - Delta^2)."""
        return v - (1.0 - self.beta2) * square * (v - square).sign()

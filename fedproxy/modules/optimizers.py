"""What steps a client's trainable parameters; its state lives for one round."""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor

from fedproxy.errors import ConfigError
from fedproxy.modules.trainer import adamw
from fedproxy.registry import Component


@dataclass(frozen=True)
class Optimizer(Component, ABC, family="client.optimizer"):
    """Base of clients' optimisers."""

    @property
    @abstractmethod
    def state_copies(self) -> float:
        """Size of its state in copies of the trainable parameters, for ``plan``."""

    def check(self, device: str, strategy: str | None) -> None:
        """Refuse a machine that cannot step it.

        Args:
            device: Kind of device, as PyTorch names it.
            strategy: How several devices train a client, None with one.

        Raises:
            ConfigError: Naming the way out.
        """

    @abstractmethod
    def make(
        self, trainer: lightning.Trainer, parameters: Sequence[Tensor], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return the optimiser of some parameters.

        Args:
            trainer: The Trainer that will step it.
            parameters: What it steps.
            lr: Learning rate.
            weight_decay: Weight decay.
        """


@dataclass(frozen=True)
class AdamW(Optimizer, name="adamw"):
    """AdamW with PyTorch's betas and eps (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    @property
    def state_copies(self) -> float:
        """Two moments."""
        return 2.0

    def make(
        self, trainer: lightning.Trainer, parameters: Sequence[Tensor], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return PyTorch's AdamW."""
        return adamw(trainer, parameters, lr=lr, weight_decay=weight_decay)


@dataclass(frozen=True)
class AdamW8bit(Optimizer, name="adamw_8bit"):
    """AdamW whose moments have 8 bits (bitsandbytes; Dettmers et al. 2022, arXiv 2110.02861).

    Tensors of fewer than 4096 values keep moments of 32 bits.
    """

    @property
    def state_copies(self) -> float:
        """Two moments of a byte a value, where parameters have four."""
        return 0.5

    def check(self, device: str, strategy: str | None) -> None:
        """Refuse what bitsandbytes cannot step.

        Raises:
            ConfigError: If it is missing, has no kernel for the device, or would see spread parameters.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "client.optimizer.name=adamw_8bit needs bitsandbytes: pip install 'fedproxy[quantization]', or use "
                "client.optimizer.name=adamw"
            )
        if strategy == "fsdp":
            raise ConfigError(
                "client.optimizer.name=adamw_8bit cannot step what trainer.strategy=fsdp spreads; use "
                "trainer.strategy=ddp or client.optimizer.name=adamw"
            )
        if not _steps(device):
            raise ConfigError(
                f"client.optimizer.name=adamw_8bit: bitsandbytes cannot step parameters on {device} here; use "
                "client.optimizer.name=adamw"
            )

    def make(
        self, trainer: lightning.Trainer, parameters: Sequence[Tensor], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return bitsandbytes' optimiser."""
        return _bitsandbytes(parameters, lr, weight_decay)


@dataclass(frozen=True)
class SGD(Optimizer, name="sgd"):
    """Plain stochastic gradient descent, with heavy-ball momentum where that is asked for.

    Weight decay is a term of the gradient, which without momentum is the decoupled one.
    """

    momentum: float = 0.0
    """Part of the last step that the next one keeps, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")

    @property
    def state_copies(self) -> float:
        """The last step, under momentum."""
        return float(self.momentum > 0)

    def make(
        self, trainer: lightning.Trainer, parameters: Sequence[Tensor], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return PyTorch's SGD."""
        return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum, weight_decay=weight_decay)


def _bitsandbytes(parameters: Sequence[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    kind = importlib.import_module("bitsandbytes.optim").AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer


def _steps(device: str) -> bool:
    """Say whether bitsandbytes moves a tensor with 8-bit moments on a kind of device: a few values tell."""
    values = torch.zeros(4096, device=device, requires_grad=True)
    values.grad = torch.ones_like(values)
    try:
        _bitsandbytes([values], 1e-3, 0.0).step()
    except Exception:  # its kernels fail in as many ways as there are devices
        return False
    return bool(torch.isfinite(values).all() and (values < 0).all())

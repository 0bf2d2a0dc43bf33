"""What rides with a client's fit, as Lightning callbacks: the regularizer's term, the round's deadline, progress."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from fedproxy.errors import ClientError, ConfigError
from fedproxy.models.sharding import is_sharded, local_parts, part_like
from fedproxy.modules.metrics import step_mean
from fedproxy.processes import rank_and_size

if TYPE_CHECKING:
    from fedproxy.strategies.regularizers import Regularizer


class Regularize(Callback):  # type: ignore[misc]
    """Adds a regularizer's gradient before every optimiser step, once per step and before gradients are clipped.

    The module has its trainable parameters by state name in ``tuned``, as
    :class:`~fedproxy.modules.causal_lm.CausalLMModule` has.

    Args:
        regularizer: The term.
        anchor: The round's broadcast state phi^t, by state name.
        conflict: Per-coordinate conflict C of the previous round (FedProxy Eq 7), or None in the first.
        pull: The regularizer's constant gradient of this round (:meth:`Regularizer.pull`), or None.

    Raises:
        ConfigError: When the fit starts, if the Trainer's strategy keeps gradients to itself.
        ClientError: In the first step, if the anchor lacks a trainable parameter.
    """

    def __init__(
        self,
        regularizer: "Regularizer",
        anchor: Mapping[str, Tensor],
        conflict: Mapping[str, Tensor] | None = None,
        pull: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.regularizer = regularizer
        self._given = anchor, conflict, pull
        self._placed: list[dict[str, Tensor] | None] = []
        self._steps = step_mean()
        self.mean_loss = 0.0
        """Mean of the term over all steps of the latest fit; 0 before a fit has ended."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Bring what the term reads to the parameters' device, once.

        Raises:
            ConfigError: If the trainer's strategy leaves no gradient to add to.
        """
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(trainer.strategy).__name__
            raise ConfigError(f"trainer.strategy: {name} leaves no gradient to add to; use auto, ddp or fsdp")
        self._placed = [_placed(tensors, module.tuned) for tensors in self._given]
        self._steps = step_mean().to(module.device)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient and note the term."""
        anchor, conflict, pull = self._placed
        assert anchor is not None  # it was given
        penalty = self.regularizer.add_gradient(local_parts(module.tuned), anchor, conflict, pull)
        if is_sharded(module.tuned):  # the term of one part: the mean over processes is then the whole term
            penalty = penalty * rank_and_size()[1]
        module.log("train/regularizer_loss", penalty)
        self._steps.update(penalty)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Let go of the broadcast."""
        self._placed = []
        self.mean_loss = float(self._steps.compute())


class Deadline(Callback):  # type: ignore[misc]
    """Ends a fit after the first batch that ends too late.

    Args:
        deadline: ``time.monotonic()`` after which to give up.

    Raises:
        ClientError: After that batch.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_train_batch_end(self, *_: Any) -> None:
        """Compare the clock with the deadline.

        Raises:
            ClientError: If it is past.
        """
        if time.monotonic() > self.deadline:
            raise ClientError("the round's time is over; raise federation.round_timeout_s")


TELL_S = 1.0
"""Seconds at least between what a fit tells of how far it has come."""


class Tell(Callback):  # type: ignore[misc]
    """Tells how far a fit has come, every :data:`TELL_S` seconds at most.

    Args:
        listener: Is given the share of the steps that are done, in [0, 1].
        steps: Optimiser steps of the fit.
    """

    def __init__(self, listener: Callable[[float], None], steps: int) -> None:
        self._listener, self._steps, self._told = listener, max(1, steps), time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Tell it."""
        if time.monotonic() - self._told >= TELL_S:
            self._told = time.monotonic()
            self._listener(min(1.0, trainer.global_step / self._steps))


def _placed(tensors: Mapping[str, Tensor] | None, tuned: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    if tensors is None:
        return None
    return {name: part_like(tensors[name], own) for name, own in tuned.items() if name in tensors}

"""The regularizer family: the term that a client adds to its task loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import Tensors
from fedproxy.registry import Component


@dataclass(frozen=True)
class Regularizer(Component, family="regularizer"):
    """Base of all client-side loss terms; the fields of a subclass are its options."""

    parts: ClassVar[tuple[str, ...]] = ()
    """Round parts that the term needs, by name: ``conflict``, the previous round's conflict map, or
    ``control_variates``, where every client keeps :meth:`finish`'s first result for its next round."""
    keeps_shared_memory: ClassVar[bool] = False
    """The server keeps :meth:`merge_shared`'s result, checkpoints it and broadcasts it."""
    coordinatewise: ClassVar[bool] = False
    """The term is a sum over coordinates, so that processes which hold parts of the parameters can add up their parts'
    terms; asked for by ``trainer.strategy=fsdp``."""
    partner: ClassVar[str] = ""
    """Name of the server optimizer that is the other half of the method, if it has one."""
    reference: ClassVar[str] = ""
    """Where the term is from."""

    def loss(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Return the term, to be added to the task loss.

        Args:
            params: The client's trainable parameters phi.
            anchor: The broadcast state phi^t, same names and shapes.
            conflict: C of the previous round (FedProxy Eq 7); None in the first round.
            pull: What :meth:`pull` returned at the start of the round, for terms that remember.

        Returns:
            0-dim float32 tensor, differentiable in ``params``.

        Raises:
            ClientError: If a parameter has no anchor.
        """
        raise NotImplementedError

    def add_gradient(
        self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None, pull: Tensors | None = None
    ) -> Tensor:
        """Add the term's gradient to every ``.grad`` and return its value.

        Equal to ``loss(...).backward()``; members override it with a few fused operations, because it runs in every
        training step over hundreds of small tensors.

        Returns:
            0-dim tensor without gradient.

        Raises:
            ClientError: If a parameter has no anchor.
        """
        loss = self.loss(params, anchor, conflict, pull)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def pull(self, own: Tensors, shared: Tensors, anchor: Tensors) -> dict[str, Tensor] | None:
        """Return the constant gradient of this round, from what client and server remember; None if there is none.

        Args:
            own: The client's memory, what :meth:`finish` returned last; empty at first.
            shared: The server's memory, broadcast as ``extras[name]``; empty at first.
            anchor: The broadcast state phi^t.
        """
        return None

    def finish(
        self, own: Tensors, shared: Tensors, delta: Tensors, *, steps: int, lr: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the client's new memory, and what it uploads as ``extras[name]``.

        The upload has the same names, shapes and dtypes in every round: the server refuses any other.

        Args:
            own: The client's memory before the round.
            shared: The server's memory, as broadcast.
            delta: The client's update.
            steps: Optimiser steps taken.
            lr: Learning rate of those steps.
        """
        return {}, {}

    def merge_shared(self, shared: Tensors, uploads: Sequence[Tensors], clients: int) -> dict[str, Tensor]:
        """Return the server's new memory.

        Args:
            shared: The server's memory before the round.
            uploads: What the round's clients sent as ``extras[name]``.
            clients: All clients of the federation, in the round or not.
        """
        return {}


def matching(params: Mapping[str, Tensor], other: Tensors, what: str) -> list[Tensor]:
    """Return the tensors of ``other`` in the order of ``params``.

    Raises:
        ClientError: If one is missing or has another shape.
    """
    found = []
    for name, param in params.items():
        if name not in other:
            raise ClientError(f"parameter {name!r} has no {what}; broadcast {what} for every trainable parameter")
        tensor = other[name]
        if tensor.shape != param.shape:
            raise ClientError(
                f"{what} of parameter {name!r} must have shape {tuple(param.shape)}, got {tuple(tensor.shape)}; "
                "use the broadcast of this run"
            )
        found.append(tensor)
    return found


def moved_from(params: Mapping[str, Tensor], anchor: Tensors) -> list[Tensor]:
    """Return phi - phi^t in float32, without gradient.

    Raises:
        ClientError: If a parameter has no anchor of its shape.
    """
    now = [param.detach().float() for param in params.values()]
    return list(torch._foreach_sub(now, [start.float() for start in matching(params, anchor, "anchor")]))


def add_to_gradients(params: Mapping[str, Tensor], pulls: list[Tensor], factor: float) -> None:
    """Add ``factor`` times a tensor per parameter to the gradients, in the parameters' dtypes."""
    present, added = [], []
    for param, pull in zip(params.values(), pulls, strict=True):
        if not param.requires_grad:
            continue
        if param.grad is None:
            param.grad = (pull * factor).to(param.dtype)
        else:
            present.append(param.grad)
            added.append(pull.to(param.dtype))
    if present:
        torch._foreach_add_(present, added, alpha=factor)


def inner(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors, 0-dim."""
    return total([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)])


def total(parts: list[Tensor]) -> Tensor:
    """Return the sum of 0-dim tensors."""
    return torch.stack(parts).sum() if parts else torch.zeros(())

"""The regularizer family: the term that a client adds to its task loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import Tensors
from fedproxy.registry import Component


@dataclass(frozen=True)
class Regularizer(Component, family="regularizer"):
    """Base of all client-side loss terms; the fields of a subclass are its options."""

    needs_conflict: ClassVar[bool] = False
    """The broadcast must carry the conflict map of the previous round."""
    reference: ClassVar[str] = ""
    """Where the term is from."""

    def loss(self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None) -> Tensor:
        """Return the term, to be added to the task loss.

        Args:
            params: The client's trainable parameters phi.
            anchor: The broadcast state phi^t, same names and shapes.
            conflict: C of the previous round (PAPER Eq 7); None in the first round.

        Returns:
            0-dim float32 tensor, differentiable in ``params``.

        Raises:
            ClientError: If a parameter has no anchor.
        """
        raise NotImplementedError

    def add_gradient(self, params: Mapping[str, Tensor], anchor: Tensors, conflict: Tensors | None) -> Tensor:
        """Add the term's gradient to every ``.grad`` and return its value.

        Equal to ``loss(...).backward()``; members override it with a few fused operations, because it runs in every
        training step over hundreds of small tensors.

        Returns:
            0-dim tensor without gradient.

        Raises:
            ClientError: If a parameter has no anchor.
        """
        loss = self.loss(params, anchor, conflict)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


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

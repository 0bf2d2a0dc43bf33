"""The server optimizer family: how the merged update changes the shared state."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import Tensors
from fedproxy.registry import Component

Memory = Mapping[str, Tensor]
"""Moments across rounds: flat and of tensors only, so that it is saved as safetensors."""


@dataclass(frozen=True)
class ServerOptimizer(Component, family="server_optimizer"):
    """Base of the optimizers that treat the merged update as a pseudo-gradient; a subclass's fields are its options."""

    stateful: ClassVar[bool] = False
    """Keeps memory across rounds."""
    partner: ClassVar[str] = ""
    """Name of the regularizer that is the other half of the method, if it has one."""
    reference: ClassVar[str] = ""
    """Where the optimizer is from."""
    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the moments kept per tensor."""

    def taking(self, present: float) -> Self:
        """Return the optimizer of a round of whose clients this part, in (0, 1], sent an update that counts."""
        return self

    def step(
        self, state: Tensors, delta: Tensors, memory: Memory | None = None, resting: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Apply one round's merged update.

        Args:
            state: phi^t; left untouched.
            delta: Merged update, same names and shapes.
            memory: What the previous step returned; None in the first.
            resting: Tensors that nobody trained in this round: they stay, and so do their moments.

        Returns:
            phi^{t+1} in the state's dtypes, and the memory for the next step.

        Raises:
            ClientError: If state and update do not have the same tensors.
        """
        if set(state) != set(delta):
            odd = min(set(state) ^ set(delta))
            raise ClientError(f"the merged update must have the state's tensors, but {odd!r} is in only one of them")
        before = memory or {}
        new_state: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        for name in sorted(state):
            slots = {slot: before[f"{slot}/{name}"] for slot in self.slots if f"{slot}/{name}" in before}
            if name in resting:
                new_state[name] = state[name].clone()
            else:
                change, slots = self.update(delta[name].float(), slots)
                new_state[name] = (state[name].float() + change).to(state[name].dtype)
            after.update({f"{slot}/{name}": value for slot, value in slots.items()})
        return new_state, after

    def update(self, delta: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one tensor's change and new moments.

        Args:
            delta: float32 (*shape), the merged update.
            slots: float32 (*shape) moments of the previous step by name; empty in the first.
        """
        raise NotImplementedError

"""Fewer bytes on the wire: state and update in bfloat16 or int8, the conflict map in few bits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.functional.quantisation import (
    BLOCK,
    bits_for,
    conflict_codes,
    conflict_levels,
    conflict_of,
    dequantise,
    pack,
    packed_bytes,
    quantise,
    unpack,
)
from fedproxy.strategies.round_parts.base import ClientRound, Forms, Group, RoundPart, RoundResult
from fedproxy.strategies.trainable.base import TrainableModel

PRECISIONS = ("float32", "bf16", "int8")
_CLIENTS = "conflict.clients"
"""Says of how many clients a packed conflict map is, int16; a map is packed where this is there."""


@dataclass(frozen=True)
class Precision(RoundPart, name="precision"):
    """Rounds what crosses the wire: ``int8`` has one float32 scale for each block of 64 values.

    The state goes down in ``down``, the update comes up in ``up``; further parts stay as they are, but for the conflict
    map, which goes down in as few bits as its K / 2 + 1 values need unless ``down`` is float32. With ``feedback`` a
    client adds what rounding its last update lost to its next one (error feedback, Seide et al. 2014; Karimireddy et
    al. 2019, arXiv 1901.09847); it is kept with the client's memory, so that a run that goes on forgets none of it.
    """

    order: ClassVar[int] = 90
    optional: ClassVar[bool] = True
    host_copies: ClassVar[int] = 1

    up: str = "float32"
    """Precision of updates: float32, bf16 or int8."""
    down: str = "float32"
    """Precision of the state that is broadcast: float32, bf16 or int8."""
    feedback: bool = True
    """Whether clients add what rounding lost to their next update."""

    def __post_init__(self) -> None:
        """Check the options."""
        for key in ("up", "down"):
            self.require(key, getattr(self, key) in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Round the state and pack the conflict map."""
        return self._mapped(broadcast, lambda sent: self._encoded(sent, memory.get(_CLIENTS)))

    def seen(self, broadcast: Broadcast) -> Broadcast:
        """Return the broadcast with its state and conflict map as float32 again."""
        return self._mapped(broadcast, self._decoded)

    def receive(self, task: ClientRound) -> None:
        """Decode what came."""
        task.broadcast = self.seen(task.broadcast)
        task.state = dict(task.broadcast.state)

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Round the update, with what was lost of the last one; for tensors that rest that waits until they train."""
        before = task.memory.get(self.name, {})
        waiting = {name: before[name] for name in task.broadcast.job.get("frozen", ()) if name in before}
        lost = {name: before[name] for name in before if name not in waiting}
        exact = {n: t.float() + lost[n] if n in lost else t.float() for n, t in update.delta.items()}
        sent, scales = encoded(exact, self.up)
        if self.feedback and self.up != "float32":
            back = decoded(sent, scales)
            task.kept[self.name] = {name: exact[name] - back[name] for name in exact} | waiting
        extras = {**update.extras, self.name: scales} if scales else update.extras
        return replace(update, delta=sent, extras=extras)

    def take(self, update: ClientUpdate, broadcast: Broadcast) -> ClientUpdate:
        """Return the update as float32."""
        if self.up == "float32":
            return update
        delta = decoded(update.delta, update.extras.get(self.name, {}))
        return replace(update, delta=delta, extras={n: g for n, g in update.extras.items() if n != self.name})

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Remember of how many clients the round's conflict map is."""
        return {_CLIENTS: torch.tensor(len(result.updates), dtype=torch.int16)}

    def remembers(self, forms: Forms) -> Tensors:
        """Return the number of clients of a round in which nobody is dropped."""
        return {_CLIENTS: torch.tensor(forms.drawn, dtype=torch.int16)}

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Replace the update's forms by the rounded ones."""
        sent, scales = encoded(up["delta"].tensors, self.up)
        groups = {**up, "delta": replace(up["delta"], tensors=sent)}
        return {**groups, self.name: Group(scales)} if scales else groups

    def _mapped(self, broadcast: Broadcast, change: Callable[[Broadcast], Broadcast]) -> Broadcast:
        return broadcast if self.down == "float32" else broadcast.mapped(change)

    def _encoded(self, sent: Broadcast, clients: Tensor | None) -> Broadcast:
        state, own = encoded(sent.state, self.down)
        extras: dict[str, Tensors] = dict(sent.extras)
        conflict = extras.get("conflict")
        if conflict and clients is not None:
            extras["conflict"] = {name: _packed(conflict[name], int(clients)) for name in conflict}
            own[_CLIENTS] = clients
        if own:
            extras[self.name] = own
        return replace(sent, state=state, extras=extras)

    def _decoded(self, sent: Broadcast) -> Broadcast:
        own, extras = sent.extras.get(self.name, {}), {n: g for n, g in sent.extras.items() if n != self.name}
        state = decoded(sent.state, own)
        if _CLIENTS in own:
            packed, clients = extras["conflict"], int(own[_CLIENTS])
            extras["conflict"] = {name: _unpacked(packed[name], clients, state[name]) for name in packed}
        return replace(sent, state=state, extras=extras)


def encoded(tensors: Tensors, precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return tensors in a precision, in their shapes, and by the same names the scales of those that have some.

    Args:
        tensors: float32; on the meta device forms come back.
        precision: One of :data:`PRECISIONS`.
    """
    if precision != "int8":
        dtype = torch.bfloat16 if precision == "bf16" else None
        return {name: tensors[name].to(dtype) if dtype else tensors[name] for name in tensors}, {}
    codes, scales = {}, {}
    for name in tensors:
        tensor = tensors[name]
        if tensor.is_meta:
            codes[name] = torch.empty_like(tensor, dtype=torch.int8)
            scales[name] = torch.empty(-(-tensor.numel() // BLOCK), device="meta")
        else:
            flat, scales[name] = quantise(tensor)
            codes[name] = flat.view(tensor.shape)
    return codes, scales


def decoded(tensors: Tensors, scales: Tensors) -> dict[str, Tensor]:
    """Return the float32 tensors that :func:`encoded` rounded."""
    return {
        name: dequantise(tensors[name].reshape(-1), scales[name], tuple(tensors[name].shape))
        if name in scales
        else tensors[name].float()
        for name in tensors
    }


def _packed(conflict: Tensor, clients: int) -> Tensor:
    bits = bits_for(conflict_levels(clients))
    if conflict.is_meta:
        return torch.empty(packed_bytes(conflict.numel(), bits), dtype=torch.uint8, device="meta")
    return pack(conflict_codes(conflict, clients), bits)


def _unpacked(packed: Tensor, clients: int, like: Tensor) -> Tensor:
    codes = unpack(packed, bits_for(conflict_levels(clients)), like.numel())
    return conflict_of(codes, clients, tuple(like.shape))

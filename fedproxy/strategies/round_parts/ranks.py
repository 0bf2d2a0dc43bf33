"""LoRA of a client's own rank: less to train, to hold and to send for those who have less."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.functional.lowrank import A_SUFFIX, B_SUFFIX
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Ranks(RoundPart, name="ranks"):
    """Clients train LoRA of ranks of their own, up to ``trainable.r``, at the same scale alpha / r.

    A client of rank r_k holds the first r_k rows of A and the first r_k columns of B, and receives and sends only
    these. Its model has zeros in their place beyond r_k: no gradient reaches them, so that it trains exactly LoRA of
    rank r_k (HetLoRA, Cho et al. 2024, arXiv 2401.06432). ``flora``, ``flexlora`` and ``federation.space=product``
    merge different ranks exactly; ``pad`` fills updates up with zeros for any rule, as HetLoRA does.
    """

    order: ClassVar[int] = 70
    optional: ClassVar[bool] = True

    clients: dict[str, int] = field(default_factory=dict, metadata={"server": True})
    """Rank of single clients, by name; all others train ``trainable.r``."""
    memory_gib: dict[str, float] = field(default_factory=dict, metadata={"server": True})
    """Memory of single clients, by name, in GiB: each trains the highest of ``trainable.r`` and its halves that
    fits."""
    pad: bool = field(default=False, metadata={"server": True})
    """Fill updates up with zeros to ``trainable.r``, so that any rule can merge them."""

    def __post_init__(self) -> None:
        """Check the options."""
        for client, rank in self.clients.items():
            self.require("clients", rank >= 1, f"ranks of at least 1 ({client!r})")
        for client, memory in self.memory_gib.items():
            self.require("memory_gib", memory > 0, f"positive ({client!r})")
            known = client in self.clients
            self.require("memory_gib", not known, f"of clients whose rank is not given, and {client!r} has one")

    def with_ranks(self, clients: Mapping[str, int]) -> "Ranks":
        """Return the part with further clients' ranks, found by their memory."""
        return replace(self, clients={**self.clients, **clients}, memory_gib={})

    @property
    def differs(self) -> Collection[str]:
        """The clients of a rank of their own."""
        return self.clients

    @property
    def mixes(self) -> bool:
        """Whether rules see updates of different ranks."""
        return bool(self.clients or self.memory_gib) and not self.pad

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Cut what each client of a lower rank is sent; the broadcast itself stays whole."""
        return replace(broadcast, each=_Cut(broadcast, self.clients)) if self.clients else broadcast

    def receive(self, task: ClientRound) -> None:
        """Fill the state, and the conflict map, up with zeros to the model's rank."""
        shapes = {name: parameter.shape for name, parameter in task.model.parameters().items()}
        task.state = {name: _filled(tensor, shapes[name]) for name, tensor in task.state.items()}
        extras = task.broadcast.extras
        if "conflict" in extras:
            conflict = {name: _filled(tensor, shapes[name]) for name, tensor in extras["conflict"].items()}
            task.broadcast = replace(task.broadcast, extras={**extras, "conflict": conflict})

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Send what belongs to the client's rank."""
        sent = task.broadcast.state
        delta = {name: _cut(update.delta[name], tuple(sent[name].shape)) for name in update.delta}
        return replace(update, delta=delta)

    def take(self, update: ClientUpdate, broadcast: Broadcast) -> ClientUpdate:
        """Fill the update up with zeros, where that is asked for."""
        if not self.pad or update.client_id not in self.clients:
            return update
        whole = {n: _filled(update.delta[n], tuple(t.shape)) for n, t in broadcast.state.items()}
        return replace(update, delta=whole)

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Cut the update's forms to the client's rank."""
        rank = self.clients.get(client_id)
        if rank is None:
            return up
        return {**up, "delta": replace(up["delta"], tensors=_of_rank(up["delta"].tensors, rank))}


class _Cut(Mapping[str, Broadcast]):
    """Each client's broadcast, cut to its rank when it is asked for."""

    def __init__(self, whole: Broadcast, ranks: Mapping[str, int]) -> None:
        self._whole, self._ranks = replace(whole, each=None), ranks

    def __getitem__(self, client_id: str) -> Broadcast:
        rank, whole = self._ranks.get(client_id), self._whole
        if rank is None:
            return whole
        extras: dict[str, Any] = dict(whole.extras)
        if "conflict" in extras:
            extras["conflict"] = _of_rank(extras["conflict"], rank)
        return replace(whole, state=_of_rank(whole.state, rank), extras=extras)

    def __iter__(self) -> Any:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


def _of_rank(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """Return the first rows of every A and the first columns of every B."""
    cut = {}
    for name in tensors:
        tensor = tensors[name]
        if name.endswith(A_SUFFIX):
            tensor = tensor[:rank]
        elif name.endswith(B_SUFFIX):
            tensor = tensor[:, :rank]
        cut[name] = tensor.contiguous()
    return cut


def _cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)].contiguous()


def _filled(tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if tensor.dim() != len(shape) or any(have > want for have, want in zip(tensor.shape, shape, strict=True)):
        raise ClientError(
            f"a tensor of shape {tuple(tensor.shape)} does not fit into {tuple(shape)}; train at most the rank of "
            "trainable.r"
        )
    whole = tensor.new_zeros(shape)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole

"""The updates of one round, in sorted client order, read one tensor and one block at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.functional.scratch import Scratch

BLOCK = 1 << 17
"""Coordinates of all clients together in a block: few enough that the passes over a block stay in the cache."""

WEIGHTINGS = ("examples", "tokens", "uniform")
"""What a client's weight may count."""


@dataclass(frozen=True)
class Block:
    """A run of coordinates of one tensor, of all clients."""

    name: str
    """Tensor that it belongs to."""
    start: int
    """First coordinate, row-major in the tensor."""
    values: Tensor
    """float32 (clients, n); (clients, *shape) where a rule wants whole tensors."""


class Cohort:
    """Checked view of a round's updates; holds no copy of them.

    Args:
        updates: One per client, in any order; deltas may be file-backed.

    Raises:
        ClientError: If there is no update, a client appears twice, or updates do not have the same tensors.
    """

    def __init__(self, updates: Sequence[ClientUpdate]) -> None:
        if not updates:
            raise ClientError("aggregation needs at least one client update, got 0; check federation.clients_per_round")
        self.updates = tuple(sorted(updates, key=lambda update: update.client_id))
        self.ids = tuple(update.client_id for update in self.updates)
        self.names = tuple(sorted(self.updates[0].delta))
        self._scratch = Scratch()
        for before, after in zip(self.ids, self.ids[1:], strict=False):
            if before == after:
                raise ClientError(f"client {after!r} sent two updates in one round; send one update per client")
        for update in self.updates[1:]:
            odd = sorted(set(self.names).symmetric_difference(update.delta))
            if odd:
                raise ClientError(
                    f"client {update.client_id!r} must send the same tensors as client {self.ids[0]!r}, but they "
                    f"differ in {odd[0]!r}; give every client the same trainable parameters"
                )

    @property
    def size(self) -> int:
        """Coordinates per client."""
        delta = self.updates[0].delta
        shape_of = getattr(delta, "shape", None) or (lambda name: delta[name].shape)
        shapes = (shape_of(name) for name in self.names)
        return sum(math.prod(shape) for shape in shapes)

    def __len__(self) -> int:
        return len(self.updates)

    def read(self, name: str) -> list[Tensor]:
        """Return one tensor of every client, as sent.

        Raises:
            ClientError: If a client's tensor has another shape or dtype than the first client's, or is no float tensor.
        """
        tensors = [update.delta[name] for update in self.updates]
        first = tensors[0]
        for client, tensor in zip(self.ids, tensors, strict=True):
            if tensor.shape != first.shape or tensor.dtype != first.dtype or not tensor.is_floating_point():
                raise ClientError(
                    f"client {client!r}: tensor {name!r} must be {_describe(first)} in floating point like client "
                    f"{self.ids[0]!r}'s, got {_describe(tensor)}; give every client the same trainable parameters"
                )
        return tensors

    def blocks(self, name: str, tensors: Sequence[Tensor], *, whole: bool = False) -> Iterator[Block]:
        """Yield a tensor of all clients in blocks of float32; a block may be changed and is overwritten by the next.

        Args:
            name: The tensor's name.
            tensors: What :meth:`read` returned for it.
            whole: Yield one block of shape (clients, *shape).
        """
        if whole:
            yield Block(name, 0, torch.stack([tensor.float() for tensor in tensors]))
            return
        flat = [tensor.reshape(-1) for tensor in tensors]
        size, width = flat[0].numel(), max(1024, BLOCK // len(flat))
        for start in range(0, size, width):
            rows = [tensor[start : start + width] for tensor in flat]
            values = self._scratch.take(len(rows), len(rows[0]))
            if rows[0].dtype == values.dtype:
                torch.stack(rows, out=values)
            else:
                values.copy_(torch.stack(rows))
            yield Block(name, start, values)

    def same_shapes(self) -> bool:
        """Return whether all clients' tensors have the same shapes."""
        first = self.updates[0].delta
        return all(update.delta[name].shape == first[name].shape for update in self.updates for name in self.names)

    def require_extras(self, groups: Sequence[str], rule: str) -> None:
        """Raise a ClientError unless every update carries these groups of statistics."""
        for update in self.updates:
            for group in groups:
                if group not in update.extras:
                    raise ClientError(
                        f"client {update.client_id!r} must send extras[{group!r}] for aggregator {rule!r}, got "
                        f"{sorted(update.extras)}; let the clients compute it or choose another aggregator"
                    )

    def extra(self, update: ClientUpdate, group: str, name: str) -> Tensor:
        """Return one tensor of a client's statistics.

        Raises:
            ClientError: If the client did not send it, or it is not finite.
        """
        if name not in update.extras[group]:
            raise ClientError(
                f"client {update.client_id!r}: extras[{group!r}] must have tensor {name!r} like the update; "
                "send statistics of every trainable parameter"
            )
        values = update.extras[group][name]
        if not bool(values.isfinite().all()):
            raise ClientError(
                f"client {update.client_id!r}: extras[{group!r}][{name!r}] must be finite, got NaN or infinity; "
                "leave the client out of the round"
            )
        return values

    def shares(self, weighting: str) -> Tensor:
        """Return float64 (clients,) that sums to 1: each client's share of the examples or tokens, or 1 / clients.

        Raises:
            ClientError: If a client reports no positive count.
        """
        if weighting == "uniform":
            return torch.full((len(self),), 1.0 / len(self), dtype=torch.float64)
        field = {"examples": "num_examples", "tokens": "num_tokens"}[weighting]
        counts = [getattr(update, field) for update in self.updates]
        for client, count in zip(self.ids, counts, strict=True):
            if count <= 0:
                raise ClientError(
                    f"client {client!r} must report {field} > 0 for weighting {weighting!r}, got {count}; "
                    "leave the client out or set aggregator.weighting=uniform"
                )
        weights = torch.tensor(counts, dtype=torch.float64)
        return weights / weights.sum()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

"""The updates of one round, in sorted client order, read one tensor and one block at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import ClientUpdate, TensorFile, Tensors
from fedproxy.strategies.functional.scratch import Scratch

BLOCK = 1 << 20
"""Coordinates of all clients together in a block: enough that Python's share of the time is small."""

WEIGHTINGS = ("examples", "tokens", "uniform")
"""What a client's weight may count."""


@dataclass(frozen=True)
class Block:
    """A run of coordinates of one tensor, of all clients."""

    name: str
    """Tensor that it belongs to."""
    start: int
    """First coordinate, row-major in the tensor."""
    rows: Sequence[Tensor]
    """Every client's part, float32 (n,), or (*shape) where a rule wants whole tensors; perhaps its own memory."""
    scratch: Scratch = field(default_factory=Scratch, repr=False)
    """Where :attr:`values` is put."""

    @cached_property
    def values(self) -> Tensor:
        """A copy of the rows, float32 (clients, n) or (clients, *shape), free to change until the next block."""
        first = self.rows[0]
        return torch.stack(tuple(self.rows), out=self.scratch.take(len(self.rows), *first.shape))


@dataclass(frozen=True)
class Source:
    """One tensor of one client, in memory or in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Callable[[int, int], Tensor]
    """Returns coordinates [start, stop) of the flattened tensor, in its dtype."""

    @classmethod
    def of(cls, delta: Tensors, name: str) -> "Source":
        """Return a source for one tensor of an update; nothing is read from files yet."""
        if isinstance(delta, TensorFile):
            return cls(delta.shape(name), delta.dtype(name), lambda start, stop: delta.part(name, start, stop))
        tensor = delta[name].detach().cpu()
        flat = tensor.reshape(-1)
        return cls(tuple(tensor.shape), tensor.dtype, lambda start, stop: flat[start:stop])

    def whole(self) -> Tensor:
        """Return the whole tensor in its shape."""
        return self.part(0, math.prod(self.shape)).view(self.shape)

    def parts(self, width: int = 1 << 20) -> Iterator[Tensor]:
        """Yield the flattened tensor as float32, at most ``width`` coordinates at a time."""
        size = math.prod(self.shape)
        for start in range(0, size, width):
            yield self.part(start, min(size, start + width)).float()

    def __str__(self) -> str:
        """Return dtype and shape, for messages."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


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

    @cached_property
    def size(self) -> int:
        """Coordinates per client."""
        return sum(math.prod(Source.of(self.updates[0].delta, name).shape) for name in self.names)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.updates)

    def read(self, name: str) -> list["Source"]:
        """Return one tensor of every client, to be read in parts.

        Raises:
            ClientError: If a client's tensor has another shape or dtype than the first client's, or is no float tensor.
        """
        sources = [Source.of(update.delta, name) for update in self.updates]
        first = sources[0]
        for client, source in zip(self.ids, sources, strict=True):
            if source.shape != first.shape or source.dtype != first.dtype or not source.dtype.is_floating_point:
                raise ClientError(
                    f"client {client!r}: tensor {name!r} must be {first} in floating point like client "
                    f"{self.ids[0]!r}'s, got {source}; give every client the same trainable parameters"
                )
        return sources

    def blocks(self, name: str, sources: Sequence["Source"] | None = None, *, whole: bool = False) -> Iterator[Block]:
        """Yield a tensor of all clients in blocks of float32.

        Args:
            name: The tensor's name.
            sources: What :meth:`read` returned for it, to spare a second look.
            whole: Yield one block of shape (clients, *shape).
        """
        sources = sources or self.read(name)
        if whole:
            yield Block(name, 0, [source.whole().float() for source in sources], self._scratch)
            return
        size, width = math.prod(sources[0].shape), max(1024, BLOCK // len(sources))
        for start in range(0, size, width):
            rows = [source.part(start, min(size, start + width)).float() for source in sources]
            yield Block(name, start, rows, self._scratch)

    def same_shapes(self) -> bool:
        """Return whether all clients' tensors have the same shapes."""
        shapes = ([Source.of(update.delta, name).shape for name in self.names] for update in self.updates)
        first = next(shapes)
        return all(other == first for other in shapes)

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
        values = update.extras[group][name].detach().cpu()
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

"""The first pass over a round's updates: Gram matrix, signs, conflict, and whether every number is finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.strategies.aggregators.cohort import BLOCK, Block, Cohort
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.similarity import cosine_matrix, with_equal_rows
from fedproxy.strategies.functional.voting import over_clients

Groups = Sequence[Sequence[int]]
"""Clients that are equal in something, in groups of two or more; each begins with its lowest."""
_HEAD = 16
_LEAST, _MOST = 1e-20, 1e30
"""Squared lengths of a block's rows between which float32 neither underflows nor overflows."""


@dataclass(frozen=True)
class Survey:
    """Facts about the untrimmed updates of one round, from one pass over their coordinates."""

    grams: Mapping[str, Tensor]
    """float64 (clients, clients) inner products, per tensor."""
    conflict: Mapping[str, Tensor]
    """float32 C_p (FedProxy Eq 7), per tensor, in the tensor's shape."""
    conflict_mean: float
    """Mean of C_p over all coordinates."""
    sign_agreement: float
    """Mean of |sum of signs| / movers over the coordinates that some client moved; 1 where none moved."""
    equals: Groups = ()
    """Clients whose updates are equal to the bit."""

    @property
    def sign_figures(self) -> dict[str, float]:
        """Round figures that come from the signs of the coordinates."""
        return {"conflict_mean": self.conflict_mean, "sign_agreement": self.sign_agreement}

    @property
    def gram(self) -> Tensor:
        """float64 (clients, clients), inner products of whole updates."""
        return with_equal_rows(torch.stack(list(self.grams.values())).sum(dim=0), self.equals)

    @property
    def cosine(self) -> Tensor:
        """float64 (clients, clients), S_ij of Eq (5)."""
        return cosine_matrix(self.gram)


@dataclass
class _Tensor:
    """What was seen of one tensor: float64 sums, so that their order does not show."""

    gram: Tensor
    equals: Groups
    """Clients whose coordinates have all been equal so far."""
    size: int = 0
    moved: float = 0.0
    conflict: float = 0.0
    agreement: float = 0.0


class Surveyor:
    """Builds a survey from blocks, which it leaves as they are; different tensors may be seen side by side.

    Args:
        cohort: The round's updates.
        ignore_unmoved: Give coordinates that nobody moved conflict 0 instead of Eq (7)'s 1.
        signs: Take in signs and conflict too; without, only inner products.
        sink: Where the conflict map goes; memory if None.
        decides: A rule goes by the inner products, which are then of float64 products throughout. Where they are only
            reported, products are summed in float32 over a block, and blocks in float64.
    """

    def __init__(
        self,
        cohort: Cohort,
        *,
        ignore_unmoved: bool = False,
        signs: bool = True,
        sink: Sink | None = None,
        decides: bool = True,
    ) -> None:
        self._cohort, self._sink, self._with_signs, self._decides = cohort, sink or Sink(), signs, decides
        self._mask_unmoved = ignore_unmoved or len(cohort) == 1
        self._ones = torch.ones(len(cohort))
        self._doubles, self._scratch = Scratch(torch.float64), Scratch()
        self._seen: dict[str, _Tensor] = {}

    def open(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor of this shape."""
        clients = len(self._cohort)
        if self._with_signs:
            self._sink.open(name, shape, torch.float32)
        self._seen[name] = _Tensor(torch.zeros(clients, clients, dtype=torch.float64), [range(clients)])

    def see(self, block: Block) -> None:
        """Take in the next block of the tensor that was opened last."""
        rows = [row.reshape(-1) for row in block.rows]
        width = max(1024, BLOCK // len(rows))
        for start in range(0, len(rows[0]), width):
            self._take_in(block.name, block.start + start, [row[start : start + width] for row in rows])

    def close(self, name: str) -> None:
        """End a tensor.

        Raises:
            ClientError: If an update holds NaN or infinity; names client and tensor.
        """
        seen = self._seen[name]
        check_finite(self._cohort, name, seen.gram)
        seen.gram = with_equal_rows(seen.gram, seen.equals)

    def run(self) -> Survey:
        """Read every update once and return the survey."""
        side_by_side(self._look_through, self._cohort.names)
        return self.survey()

    def survey(self) -> Survey:
        """Return what was seen."""
        seen = dict(sorted(self._seen.items()))
        size, moved, conflict, agreement = (
            math.fsum(getattr(tensor, field) for tensor in seen.values())
            for field in ("size", "moved", "conflict", "agreement")
        )
        return Survey(
            {name: tensor.gram for name, tensor in seen.items()},
            self._sink.tensors(),
            conflict / max(1, size),
            agreement / moved if moved else 1.0,
            _equal_in_all([tensor.equals for tensor in seen.values()], len(self._cohort)),
        )

    def _look_through(self, name: str) -> None:
        sources = self._cohort.read(name)
        self.open(name, sources[0].shape)
        for block in self._cohort.blocks(name, sources):
            self.see(block)
        self.close(name)

    def _take_in(self, name: str, start: int, rows: Sequence[Tensor]) -> None:
        seen, wide = self._seen[name], self._scratch.take(len(rows), len(rows[0]))
        if self._decides:
            self._add_exact(seen.gram, rows, signs=wide)
        elif _add_rounded(seen.gram, torch.stack(tuple(rows), out=wide)):
            wide.sign_()
        else:
            self._add_exact(seen.gram, rows, signs=wide)
        # Updates that differ do so in the first block: there is next to nothing left to compare after it.
        seen.equals = _still_equal(seen.equals, rows)
        if self._with_signs:
            self._take_in_signs(name, start, wide)

    def _add_exact(self, gram: Tensor, rows: Sequence[Tensor], *, signs: Tensor) -> None:
        """Add the inner products of rows (n,), of float64 products, and write their signs, float32 (clients, n)."""
        doubles = self._doubles.take(*signs.shape)
        for row, double, sign in zip(rows, doubles, signs, strict=True):
            double.copy_(row)
            if self._with_signs:
                torch.sign(row, out=sign)  # while the row is in the cache
        torch.addmm(gram, doubles, doubles.T, out=gram)

    def _take_in_signs(self, name: str, start: int, signs: Tensor) -> None:
        (clients, count), seen = signs.shape, self._seen[name]
        lead = over_clients(self._ones, signs, out=self._scratch.take(count, slot="lead")).abs_()
        conflict = torch.mul(lead, -1.0 / clients, out=self._sink.room(name, start, count)).add_(1.0)
        led = float(lead.sum())
        seen.size += count
        if float(torch.dot(signs.view(-1), signs.view(-1))) == signs.numel():  # nobody stood still anywhere
            seen.moved += count
            seen.agreement += led / clients
            seen.conflict += count - led / clients
        else:
            movers = self._ones @ signs.abs_()
            if self._mask_unmoved:
                conflict.mul_(movers.sign())
            seen.moved += float(movers.sign().sum())
            seen.agreement += float(lead.div_(movers.clamp_(min=1.0)).sum())
            seen.conflict += float(conflict.sum())


def _add_rounded(gram: Tensor, rows: Tensor) -> bool:
    """Add the inner products of float32 rows (clients, n), those below the diagonal in part.

    Returns:
        False, with nothing added, where float32 cannot hold the squares.
    """
    products, half = torch.zeros(len(rows), len(rows)), len(rows) // 2
    torch.mm(rows[:half], rows.T, out=products[:half])  # what lies below the diagonal is not read
    products[half:, half:] = rows[half:] @ rows[half:].T
    fits = all(_LEAST < square < _MOST for square in products.diagonal().tolist())
    if fits:
        gram.add_(products)
    return fits


def _still_equal(groups: Groups, rows: Sequence[Tensor]) -> Groups:
    """Return the groups of two or more whose rows are equal too; their first numbers tell most rows apart."""
    found: list[list[int]] = []
    for group in groups:
        alike: dict[tuple[float, ...], list[int]] = {}
        for client in group:
            alike.setdefault(tuple(rows[client][:_HEAD].tolist()), []).append(client)
        for left in alike.values():
            while len(left) > 1:
                first, *others = left
                same = [client for client in others if torch.equal(rows[first], rows[client])]
                found += [[first, *same]] if same else []
                left = [client for client in others if client not in same]
    return found


def _equal_in_all(groups: Sequence[Groups], clients: int) -> Groups:
    """Return the clients that are in one group for every tensor."""
    marks: list[list[int]] = [[] for _ in range(clients)]
    for of_tensor in groups:
        first = {client: group[0] for group in of_tensor for client in group}
        for client, own in enumerate(marks):
            own.append(first.get(client, client))
    together: dict[tuple[int, ...], list[int]] = {}
    for client, own in enumerate(marks):
        together.setdefault(tuple(own), []).append(client)
    return [group for group in together.values() if len(group) > 1] if groups else []


def check_finite(cohort: Cohort, name: str, gram: Tensor) -> None:
    """Raise a ClientError that names the client whose squared norm in ``gram`` is not finite."""
    for client, square in zip(cohort.ids, gram.diagonal().tolist(), strict=True):
        if not square < float("inf"):
            raise not_finite(client, name)


def not_finite(client: str, name: str) -> ClientError:
    """Return the error about a client's tensor that holds NaN or infinity."""
    return ClientError(
        f"client {client!r}: tensor {name!r} must be finite, got NaN or infinity; "
        "lower client.lr or leave the client out of the round"
    )

"""The first pass over a round's updates: Gram matrix, signs, conflict, and whether every number is finite."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.strategies.aggregators.cohort import BLOCK, Block, Cohort
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.similarity import cosine_matrix


@dataclass(frozen=True)
class Survey:
    """Facts about the untrimmed updates of one round, from one pass over their coordinates."""

    grams: Mapping[str, Tensor]
    """float64 (clients, clients) inner products, per tensor."""
    conflict: Mapping[str, Tensor]
    """float32 C_p (PAPER Eq 7), per tensor, in the tensor's shape."""
    conflict_mean: float
    """Mean of C_p over all coordinates."""
    sign_agreement: float
    """Mean of |sum of signs| / movers over the coordinates that some client moved; 1 where none moved."""

    @property
    def sign_figures(self) -> dict[str, float]:
        """Round figures that come from the signs of the coordinates."""
        return {"conflict_mean": self.conflict_mean, "sign_agreement": self.sign_agreement}

    @property
    def gram(self) -> Tensor:
        """float64 (clients, clients), inner products of whole updates."""
        return torch.stack(list(self.grams.values())).sum(dim=0)

    @property
    def cosine(self) -> Tensor:
        """float64 (clients, clients), S_ij of Eq (5)."""
        return cosine_matrix(self.gram)


class Surveyor:
    """Builds a survey from blocks, which it leaves as they are.

    Args:
        cohort: The round's updates.
        ignore_unmoved: Give coordinates that nobody moved conflict 0 instead of Eq (7)'s 1.
        sink: Where the conflict map goes; memory if None.
    """

    def __init__(self, cohort: Cohort, *, ignore_unmoved: bool = False, sink: Sink | None = None) -> None:
        self._cohort, self._sink = cohort, sink or Sink()
        self._mask_unmoved = ignore_unmoved or len(cohort) == 1
        self._ones = torch.ones(len(cohort))
        self._doubles, self._signs = Scratch(torch.float64), Scratch()
        self._grams: dict[str, Tensor] = {}
        self._size, self._moved, self._conflict, self._agreement = 0, 0.0, 0.0, 0.0

    def open(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor of this shape."""
        clients = len(self._cohort)
        self._sink.open(name, shape, torch.float32)
        self._grams[name] = torch.zeros(clients, clients, dtype=torch.float64)

    def see(self, block: Block) -> None:
        """Take in the next block of the tensor that was opened last."""
        values = block.values.reshape(len(self._cohort), -1)
        width = max(1024, BLOCK // len(values))
        for start in range(0, values.shape[1], width):
            self._take_in(block.name, block.start + start, values[:, start : start + width])

    def close(self, name: str) -> None:
        """End a tensor.

        Raises:
            ClientError: If an update holds NaN or infinity; names client and tensor.
        """
        check_finite(self._cohort, name, self._grams[name])

    def run(self) -> Survey:
        """Read every update once and return the survey."""
        for name in self._cohort.names:
            sources = self._cohort.read(name)
            self.open(name, sources[0].shape)
            for block in self._cohort.blocks(name, sources):
                self.see(block)
            self.close(name)
        return self.survey()

    def survey(self) -> Survey:
        """Return what was seen."""
        agreement = self._agreement / self._moved if self._moved else 1.0
        return Survey(self._grams, self._sink.tensors(), self._conflict / max(1, self._size), agreement)

    def _take_in(self, name: str, start: int, values: Tensor) -> None:
        clients, count = values.shape
        wide = self._doubles.take(clients, count).copy_(values)
        gram = self._grams[name]
        torch.addmm(gram, wide, wide.T, out=gram)
        signs = torch.sign(values, out=self._signs.take(clients, count))
        lead = (self._ones @ signs).abs_()
        conflict = torch.mul(lead, -1.0 / clients).add_(1.0)
        led = float(lead.sum())
        self._size += count
        if float(torch.dot(signs.view(-1), signs.view(-1))) == signs.numel():  # nobody stood still anywhere
            self._moved += count
            self._agreement += led / clients
            self._conflict += count - led / clients
        else:
            movers = self._ones @ signs.abs_()
            if self._mask_unmoved:
                conflict.mul_(movers.sign())
            self._moved += float(movers.sign().sum())
            self._agreement += float(lead.div_(movers.clamp_(min=1.0)).sum())
            self._conflict += float(conflict.sum())
        self._sink.write(name, start, conflict)


def check_finite(cohort: Cohort, name: str, gram: Tensor) -> None:
    """Raise a ClientError that names the client whose squared norm in ``gram`` is not finite."""
    for client, square in zip(cohort.ids, gram.diagonal().tolist(), strict=True):
        if not square < float("inf"):
            raise ClientError(
                f"client {client!r}: tensor {name!r} must be finite, got NaN or infinity; "
                "lower client.lr or leave the client out of the round"
            )

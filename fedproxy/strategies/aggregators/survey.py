"""The first pass over a round's updates: Gram matrix, signs, conflict, and whether every number is finite."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.strategies.aggregators.cohort import Cohort
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


def take_survey(cohort: Cohort, *, ignore_unmoved: bool = False, sink: Sink | None = None) -> Survey:
    """Read every update once.

    Args:
        cohort: The round's updates.
        ignore_unmoved: Give coordinates that nobody moved conflict 0 instead of Eq (7)'s 1.
        sink: Where the conflict map goes; memory if None.

    Raises:
        ClientError: If an update holds NaN or infinity; names client and tensor.
    """
    clients = len(cohort)
    grams, conflict = {}, sink or Sink()
    moved, conflict_sum, agreement_sum = 0.0, 0.0, 0.0
    ones, doubles = torch.ones(clients), Scratch(torch.float64)
    for name in cohort.names:
        shape = cohort.read(name)[0].shape
        gram = torch.zeros(clients, clients, dtype=torch.float64)
        conflict.open(name, shape, torch.float32)
        for block in cohort.blocks(name):
            wide = doubles.take(*block.values.shape).copy_(block.values)
            gram += wide @ wide.T
            signs = block.values.sign_()
            lead = (ones @ signs).abs_()
            movers = ones @ signs.abs_()
            part = torch.mul(lead, -1.0 / clients).add_(1.0)
            if ignore_unmoved or clients == 1:
                part.mul_(movers.sign())
            conflict.write(name, block.start, part)
            conflict_sum += float(part.sum())
            moved += float(movers.sign().sum())
            agreement_sum += float(lead.div_(movers.clamp_(min=1.0)).sum())
        check_finite(cohort, name, gram)
        grams[name] = gram
    size = cohort.size
    return Survey(grams, conflict.tensors(), conflict_sum / max(1, size), agreement_sum / moved if moved else 1.0)


def check_finite(cohort: Cohort, name: str, gram: Tensor) -> None:
    """Raise a ClientError that names the client whose squared norm in ``gram`` is not finite."""
    for client, square in zip(cohort.ids, gram.diagonal().tolist(), strict=True):
        if not square < float("inf"):
            raise ClientError(
                f"client {client!r}: tensor {name!r} must be finite, got NaN or infinity; "
                "lower client.lr or leave the client out of the round"
            )

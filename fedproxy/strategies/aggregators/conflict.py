"""Multi-task rules that resolve conflicts between whole updates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.seeding import generator
from fedproxy.strategies.aggregators.base import RoundContext
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.span import SpanAggregator
from fedproxy.strategies.functional.gradients import cagrad, config, mgda, pcgrad


@dataclass(frozen=True)
class PCGrad(SpanAggregator, name="pcgrad"):
    """Gradient surgery (Yu et al. 2020, arXiv 2001.06782, Alg. 1).

    If D_i . Delta_j < 0: D_i <- D_i - (D_i . Delta_j / ||Delta_j||^2) Delta_j, with Delta_j as sent.
    Each client meets the others in a random order drawn from the run's seed, the round and the client's name. Choice:
    the mean of the projected D_i is returned, where the paper has their sum.
    """

    reference: ClassVar[str] = "Yu et al. 2020, arXiv 2001.06782, Alg. 1"
    definition: ClassVar[str] = "multitask.pcgrad"

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Project every client's update in its own seeded order."""
        orders = [
            torch.randperm(len(cohort), generator=generator(context.seed, context.round, client, "pcgrad"))
            for client in cohort.ids
        ]
        return pcgrad(gram, torch.stack(orders))


@dataclass(frozen=True)
class CAGrad(SpanAggregator, name="cagrad"):
    """Conflict-averse step (Liu et al. 2021, arXiv 2110.14048, Alg. 1): d = g0 + c ||g0|| g_w / ||g_w||.

    g0 is the mean update and w minimises g_w . g0 + c ||g0|| ||g_w|| over the simplex.
    """

    reference: ClassVar[str] = "Liu et al. 2021, arXiv 2110.14048, Alg. 1"
    definition: ClassVar[str] = "multitask.cagrad_gain"

    c: float = 0.5
    """Radius around the mean update, in units of its norm, in [0, 1); 0 is the plain mean."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("c", 0.0 <= self.c < 1.0, "in [0, 1)")

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Solve the dual problem over the simplex."""
        return cagrad(gram, c=self.c)


@dataclass(frozen=True)
class ConFIG(SpanAggregator, name="config"):
    """Conflict-free step (Liu et al. 2024, arXiv 2408.11104, Eq 2): equal, positive cosine with every update.

    v = U(M^+ 1) with the unit updates as rows of M; d = (sum_i Delta_i . v) v. The paper's length is a sum, about
    clients times an averaging step: ``length: mean`` divides by the number of clients.
    """

    reference: ClassVar[str] = "Liu et al. 2024, arXiv 2408.11104, Eq 2"
    definition: ClassVar[str] = "multitask.config"

    length: str = "sum"
    """``sum`` of the projections (the paper's) or their ``mean`` (an averaging step, for federations)."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("length", self.length in ("sum", "mean"), "one of sum, mean")

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Solve for the direction by the pseudo-inverse of the cosine matrix."""
        return config(gram, length=self.length)


@dataclass(frozen=True)
class MGDA(SpanAggregator, name="mgda"):
    """Multiple-gradient descent (Sener and Koltun 2018, arXiv 1810.04650, Eq 3): the least-norm convex combination."""

    reference: ClassVar[str] = "Sener and Koltun 2018, arXiv 1810.04650, Eq 3"
    definition: ClassVar[str] = "multitask.mgda_cost"

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Minimise ||sum_k c_k Delta_k|| over the simplex."""
        return mgda(gram)

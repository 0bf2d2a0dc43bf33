"""Krum and its kin: trust the updates that have many others near them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ConfigError
from fedproxy.strategies.aggregators.base import Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.span import SpanAggregator
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.functional.robust import (
    bulyan_selection,
    krum_scores,
    mean_nearest_median,
    sort_clients,
    squared_distances,
)


@dataclass(frozen=True)
class ByzantineAggregator(SpanAggregator):
    """Base of the rules that stand up to a known number of hostile clients."""

    clients_per_byzantine: ClassVar[int] = 2
    """The rule needs this many times ``byzantine`` clients, plus 3."""

    byzantine: int = 1
    """Clients that may be hostile (f), >= 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("byzantine", self.byzantine >= 0, ">= 0")

    @property
    def min_clients(self) -> int:
        """Fewest clients for which the rule's guarantee holds."""
        return self.clients_per_byzantine * self.byzantine + 3

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Refuse too small a round, then choose.

        Raises:
            ConfigError: If there are fewer than ``clients_per_byzantine * byzantine + 3`` clients.
        """
        if len(cohort) < self.min_clients:
            raise ConfigError(
                f"aggregator.byzantine: {self.name!r} with byzantine={self.byzantine} needs at least "
                f"{self.min_clients} clients a round, got {len(cohort)}; "
                "lower aggregator.byzantine or raise federation.clients_per_round"
            )
        return super().plan(cohort, survey, memory, context)


@dataclass(frozen=True)
class Krum(ByzantineAggregator, name="krum"):
    """The one update nearest to its K - f - 2 nearest others (Blanchard et al. 2017, NeurIPS, arXiv 1703.02757).

    Score of k: sum of squared distances of whole updates to those others; of equal scores the first client in sorted
    order wins. Needs K >= 2 f + 3.
    """

    reference: ClassVar[str] = "Blanchard et al. 2017, NeurIPS, arXiv 1703.02757"
    definition: ClassVar[str] = "means.multi_krum"

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Put all weight on the client of least score."""
        chosen = torch.zeros(len(gram), dtype=torch.float64)
        chosen[krum_scores(squared_distances(gram), self.byzantine).argmin()] = 1.0
        return chosen


@dataclass(frozen=True)
class MultiKrum(ByzantineAggregator, name="multi_krum"):
    """Mean of the ``keep`` updates of least Krum score (Blanchard et al. 2017, arXiv 1703.02757); K >= 2 f + 3."""

    reference: ClassVar[str] = "Blanchard et al. 2017, NeurIPS, arXiv 1703.02757"
    definition: ClassVar[str] = "means.multi_krum"

    keep: int | None = None
    """Updates to average, >= 1; None is clients - byzantine."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("keep", self.keep is None or self.keep >= 1, ">= 1 or null")

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Share the weight among the clients of least score."""
        keep = min(len(gram), self.keep or len(gram) - self.byzantine)
        best = krum_scores(squared_distances(gram), self.byzantine).argsort(stable=True)[:keep]
        chosen = torch.zeros(len(gram), dtype=torch.float64)
        chosen[best] = 1.0 / keep
        return chosen


@dataclass(frozen=True)
class Bulyan(ByzantineAggregator, name="bulyan"):
    """Krum repeated, then a mean around the median (El Mhamdi et al. 2018, arXiv 1802.07927).

    K - 2 f clients are picked by Krum, one after the other; each coordinate is the mean of the K - 4 f picked values
    nearest to their median. Needs K >= 4 f + 3.
    """

    reference: ClassVar[str] = "El Mhamdi et al. 2018, arXiv 1802.07927"
    definition: ClassVar[str] = "means.bulyan"
    clients_per_byzantine: ClassVar[int] = 4
    combines_by_gram: ClassVar[bool] = False

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Mark the picked clients with equal weights."""
        picked = bulyan_selection(squared_distances(gram), self.byzantine)
        chosen = torch.zeros(len(gram), dtype=torch.float64)
        chosen[picked] = 1.0 / len(picked)
        return chosen

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Pick by Krum, then merge coordinate by coordinate."""
        plan = super().plan(cohort, survey, memory, context)
        assert plan.weights is not None
        picked = plan.weights.nonzero().squeeze(1)
        count = len(cohort) - 4 * self.byzantine

        def merge(block: Block) -> Tensor:
            return mean_nearest_median(sort_clients(block.values[picked]), count)

        return Plan(merge, plan.weights)

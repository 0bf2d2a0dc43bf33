"""Weighted means: linear rules that see nothing but the updates' sum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.survey import Survey

WEIGHTINGS = ("examples", "tokens", "uniform")


@dataclass(frozen=True)
class LinearAggregator(Aggregator):
    """Base of the rules that return a fixed weighted sum of the updates."""

    linear: ClassVar[bool] = True
    needs_individual_updates: ClassVar[bool] = False
    coordinatewise: ClassVar[bool] = True

    weighting: str = "examples"
    """What a client's weight counts: ``examples``, ``tokens`` or ``uniform``."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("weighting", self.weighting in WEIGHTINGS, f"one of {', '.join(WEIGHTINGS)}")

    def weigh(self, cohort: Cohort, survey: Survey) -> Tensor:
        """Return each client's share of the examples or tokens."""
        return cohort.shares(self.weighting)

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Merge each block as one weighted sum."""
        weights = self.weigh(cohort, survey)
        factors = weights.float()

        def merge(block: Block) -> Tensor:
            return torch.mv(block.values.T, factors)

        return Plan(merge, weights)


@dataclass(frozen=True)
class FedAvg(LinearAggregator, name="fedavg"):
    """Weighted mean sum_k (n_k / n) Delta_k (McMahan et al. 2017, arXiv 1602.05629, Alg. 1)."""

    reference: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629, Alg. 1"

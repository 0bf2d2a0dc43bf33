"""Weighted means: linear rules that see nothing but the updates' sum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import WEIGHTINGS, Cohort
from fedproxy.strategies.aggregators.passes import WeightedSum
from fedproxy.strategies.aggregators.survey import Survey


@dataclass(frozen=True)
class LinearAggregator(Aggregator):
    """Base of the rules that return a fixed weighted sum of the updates."""

    reads_survey: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    coordinatewise: ClassVar[bool] = True
    combines_by_gram: ClassVar[bool] = True

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Merge each block as one weighted sum."""
        weights = self.weigh(cohort, survey)
        return Plan(WeightedSum(weights), weights, threaded=True)


@dataclass(frozen=True)
class FedAvg(LinearAggregator, name="fedavg"):
    """Weighted mean sum_k (n_k / n) Delta_k (McMahan et al. 2017, arXiv 1602.05629, Alg. 1)."""

    reference: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629, Alg. 1"
    definition: ClassVar[str] = "means.fedavg"

    weighting: str = "examples"
    """What a client's weight counts: ``examples``, ``tokens`` or ``uniform``."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("weighting", self.weighting in WEIGHTINGS, f"one of {', '.join(WEIGHTINGS)}")

    def weigh(self, cohort: Cohort, survey: Survey) -> Tensor:
        """Return each client's share of the examples or tokens."""
        return cohort.shares(self.weighting)


@dataclass(frozen=True)
class TaskArithmetic(LinearAggregator, name="task_arithmetic"):
    """scale * sum_k Delta_k (Ilharco et al. 2023, arXiv 2212.04089); every client counts once."""

    reference: ClassVar[str] = "Ilharco et al. 2023, arXiv 2212.04089"
    definition: ClassVar[str] = "means.task_arithmetic"

    scale: float = 0.4
    """Factor of the sum (the paper's lambda; 0.4 is its value without tuning)."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("scale", self.scale > 0.0, "> 0")

    def weigh(self, cohort: Cohort, survey: Survey) -> Tensor:
        """Return the scale for every client."""
        return torch.full((len(cohort),), self.scale, dtype=torch.float64)

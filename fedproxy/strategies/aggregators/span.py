"""Rules whose result is a combination sum_k c_k Delta_k with coefficients found from the updates' Gram matrix."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.passes import WeightedSum
from fedproxy.strategies.aggregators.survey import Survey


@dataclass(frozen=True)
class SpanAggregator(Aggregator):
    """Base of the rules that choose one coefficient per client; a subclass overrides :meth:`coefficients`."""

    coordinatewise: ClassVar[bool] = True
    combines_by_gram: ClassVar[bool] = True

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Return c, float64 (clients,).

        Args:
            gram: float64 (clients, clients), inner products of whole updates.
            cohort: The round's updates, in sorted client order.
            context: Round and seed.
        """
        raise NotImplementedError

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Merge each block as one combination; the coefficients are reported as weights."""
        chosen = self.coefficients(survey.gram, cohort, context)
        return Plan(WeightedSum(chosen), chosen, threaded=True)

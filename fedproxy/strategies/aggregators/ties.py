"""TIES-Merging: trim, elect signs, average what agrees."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregation, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.aggregators.trimming import SCOPES, plan_trimming
from fedproxy.strategies.aggregators.voting import VotingAggregator
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.voting import Sums, ties_of_sums


@dataclass(frozen=True)
class Ties(VotingAggregator, name="ties"):
    """TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, Sec. 3), as the authors' code by default.

    Trim each update to its largest magnitudes; elect gamma_p = sign(sum_k trimmed_kp), where a zero sum takes the sign
    that most coordinates elect; return scale times the mean of the non-zero trimmed values of the elected sign.
    Deviation: exactly floor(density P) coordinates are kept (the authors' code keeps one more and fails with one
    client). ``trim_scope: tensor, vote: weighted, divisor: weight`` is mergekit's ties; ``trim_scope: tensor,
    divisor: weighted_count`` is PEFT's. Weights are shares of examples and are read by these options alone. Without
    them it may run under secure aggregation, where clients trim and signs are elected from sums.
    """

    reference: ClassVar[str] = "Yadav et al. 2023, arXiv 2306.01708, Sec. 3"
    definition: ClassVar[str] = "ties.ties"

    density: float = 0.2
    """Share of coordinates that trimming keeps, in (0, 1]."""
    trim_scope: str = "global"
    """``global`` trims the flattened update, ``tensor`` each tensor."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("density", 0.0 < self.density <= 1.0, "in (0, 1]")
        self.require("trim_scope", self.trim_scope in SCOPES, f"one of {', '.join(SCOPES)}")

    @property
    def sum_part(self) -> Mapping[str, Any]:
        """Sums of values, magnitudes and signs do where all clients count alike."""
        if self.vote != "uniform" or self.divisor != "count":
            return {}
        return {"name": "sign_sums", "density": self.density, "trim_scope": self.trim_scope}

    def merge_sums(self, sums: Mapping[str, Sums]) -> Aggregation:
        """Elect signs and average what agrees, from sums over the clients."""
        return Aggregation({name: tensor.mul_(self.scale) for name, tensor in ties_of_sums(sums).items()})

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Find every client's cut, then vote block by block."""
        trimmers = plan_trimming(cohort, [self.density] * len(cohort), scope=self.trim_scope)
        scratch = Scratch()

        def trim(block: Block) -> Tensor:
            return trimmers[block.name].trim(block.rows, scratch.take(len(cohort), len(block.rows[0])))

        # The largest magnitudes are kept, and no other entry outweighs infinity or mends NaN.
        return replace(self.elect(cohort, trim), shows_faults=True)

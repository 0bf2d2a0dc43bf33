"""TIES-Merging: trim, elect signs, average what agrees."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.aggregators.trimming import SCOPES, plan_trimming
from fedproxy.strategies.functional.trimming import Trimmer
from fedproxy.strategies.functional.voting import agreeing_mean, elect_sign


@dataclass(frozen=True)
class Ties(Aggregator, name="ties"):
    """TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, Sec. 3), as the authors' code by default.

    Trim each update to its largest magnitudes; elect gamma_p = sign(sum_k trimmed_kp), where a zero sum takes the sign
    that most coordinates elect; return scale times the mean of the non-zero trimmed values of the elected sign.
    Deviation: exactly floor(density P) coordinates are kept (the authors' code keeps one more and fails with one
    client).
    ``trim_scope: tensor, vote: weighted, divisor: weight`` is mergekit's ties; ``trim_scope: tensor,
    divisor: weighted_count`` is PEFT's. Weights are shares of examples and are read by these options alone.
    """

    reference: ClassVar[str] = "Yadav et al. 2023, arXiv 2306.01708, Sec. 3"
    coordinatewise: ClassVar[bool] = True

    density: float = 0.2
    """Share of coordinates that trimming keeps, in (0, 1]."""
    scale: float = 1.0
    """Factor of the merged update (the paper's lambda)."""
    trim_scope: str = "global"
    """``global`` trims the flattened update, ``tensor`` each tensor."""
    vote: str = "uniform"
    """``uniform`` sums the values, ``weighted`` the values times the client's weight."""
    divisor: str = "count"
    """``count``: plain mean; ``weight``: weighted mean; ``weighted_count``: weighted sum divided by the number of
    agreeing clients, which shrinks the result about clients-fold."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("density", 0.0 < self.density <= 1.0, "in (0, 1]")
        self.require("scale", self.scale > 0.0, "> 0")
        self.require("trim_scope", self.trim_scope in SCOPES, f"one of {', '.join(SCOPES)}")
        self.require("vote", self.vote in ("uniform", "weighted"), "one of uniform, weighted")
        divisors = ("count", "weight", "weighted_count")
        self.require("divisor", self.divisor in divisors, f"one of {', '.join(divisors)}")

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Trim, then vote block by block; coordinates with a zero sum wait for the majority sign."""
        trimmers = plan_trimming(cohort, [self.density] * len(cohort), scope=self.trim_scope, size=survey.size)
        uses_weights = self.vote == "weighted" or self.divisor != "count"
        weights = cohort.shares("examples").float() if uses_weights else torch.ones(len(cohort))
        election = _Election(self, trimmers, weights)
        return Plan(election.merge, finish=election.finish)


class _Election:
    """One round's vote; remembers the coordinates whose sum is zero until the majority sign is known."""

    def __init__(self, rule: Ties, trimmers: dict[str, Trimmer], weights: Tensor) -> None:
        self._rule, self._trimmers = rule, trimmers
        self._votes = weights if rule.vote == "weighted" else None
        self._values = None if rule.divisor == "count" else weights
        self._counts = weights if rule.divisor == "weight" else None
        self._majority = 0.0
        self._open: list[tuple[str, Tensor, Tensor]] = []

    def merge(self, block: Block) -> Tensor:
        trimmed = self._trimmers[block.name](block.values)
        elected = elect_sign(trimmed, self._votes)
        self._majority += float(elected.sum(dtype=torch.float64))
        undecided = ((elected == 0) & (trimmed != 0).any(dim=0)).nonzero().squeeze(1)
        if len(undecided):
            self._open.append((block.name, undecided + block.start, trimmed[:, undecided].clone()))
        return self._mean(trimmed, elected)

    def finish(self, delta: dict[str, Tensor]) -> None:
        sign = float((self._majority > 0) - (self._majority < 0))
        for name, index, trimmed in self._open:
            merged = self._mean(trimmed, torch.full((len(index),), sign))
            flat = delta[name].view(-1)
            flat[index] = merged.to(flat.dtype)

    def _mean(self, trimmed: Tensor, elected: Tensor) -> Tensor:
        return agreeing_mean(trimmed, elected, values=self._values, counts=self._counts).mul_(self._rule.scale)

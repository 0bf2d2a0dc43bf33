"""Sign election after sparsifying: what TIES shares with the rules that thin out updates in another way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Plan
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.voting import agreeing_mean, elect_sign, plain_ties, undecided

Sparsify = Callable[[Block], Tensor]
"""Maps a block to its values with the dropped coordinates set to zero."""


@dataclass(frozen=True)
class VotingAggregator(Aggregator):
    """Base of the rules that sparsify each update and then elect signs as TIES does."""

    reads_survey: ClassVar[bool] = False
    coordinatewise: ClassVar[bool] = True

    scale: float = 1.0
    """Factor of the merged update (the papers' lambda)."""
    vote: str = "uniform"
    """``uniform`` sums the values, ``weighted`` the values times the client's share of examples."""
    divisor: str = "count"
    """``count``: plain mean of the agreeing values; ``weight``: mean weighted by examples; ``weighted_count``: weighted
    sum divided by the number of agreeing clients, which shrinks the result about clients-fold."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("scale", self.scale > 0.0, "> 0")
        self.require("vote", self.vote in ("uniform", "weighted"), "one of uniform, weighted")
        divisors = ("count", "weight", "weighted_count")
        self.require("divisor", self.divisor in divisors, f"one of {', '.join(divisors)}")

    def elect(self, cohort: Cohort, sparsify: Sparsify) -> Plan:
        """Return the plan that sparsifies each block and merges what agrees with the elected sign."""
        uses_weights = self.vote == "weighted" or self.divisor != "count"
        weights = cohort.shares("examples") if uses_weights else None
        election = _Election(self, sparsify, torch.ones(len(cohort)) if weights is None else weights.float())
        return Plan(election.merge, weights, finish=election.finish, threaded=self.coordinatewise)


class _Election:
    """One round's vote; remembers the coordinates whose sum is zero until the majority sign is known."""

    def __init__(self, rule: VotingAggregator, sparsify: Sparsify, weights: Tensor) -> None:
        self._scale, self._sparsify = rule.scale, sparsify
        self._votes = weights if rule.vote == "weighted" else None
        self._values = None if rule.divisor == "count" else weights
        self._counts = weights if rule.divisor == "weight" else None
        self._majority: dict[str, float] = {}
        self._scratch = Scratch()
        self._open: list[tuple[str, Tensor, Tensor]] = []

    def merge(self, block: Block) -> Tensor:
        sparse = self._sparsify(block)
        sparse = sparse.reshape(len(sparse), -1)  # a tensor of one number has no dimension of its own
        if self._votes is None and self._values is None:
            merged, elected, waiting = plain_ties(sparse, scratch=self._scratch)
            merged.mul_(self._scale)
        else:
            elected = elect_sign(sparse, self._votes)
            merged, waiting = self._mean(sparse, elected), undecided(sparse, elected)
        self._majority[block.name] = self._majority.get(block.name, 0.0) + float(elected.sum())
        if len(waiting):
            self._open.append((block.name, waiting + block.start, sparse[:, waiting]))
        return merged

    def finish(self, sink: Sink) -> None:
        majority = sum(self._majority.values())  # of whole numbers
        sign = float((majority > 0) - (majority < 0))
        for name, index, sparse in self._open:
            sink.patch(name, index, self._mean(sparse, torch.full((len(index),), sign)))

    def _mean(self, sparse: Tensor, elected: Tensor) -> Tensor:
        merged = agreeing_mean(sparse, elected, values=self._values, counts=self._counts, scratch=self._scratch)
        return merged.mul_(self._scale)

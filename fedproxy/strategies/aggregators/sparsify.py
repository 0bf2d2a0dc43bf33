"""Rules that differ from TIES in how an update is thinned out: DARE, DELLA and Model Breadcrumbs."""

from dataclasses import dataclass
from threading import local
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.seeding import generator
from fedproxy.strategies.aggregators.base import Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.aggregators.voting import VotingAggregator
from fedproxy.strategies.functional.sparse import dare, della
from fedproxy.strategies.functional.trimming import magnitude_window, top_count


@dataclass(frozen=True)
class SparsifyingAggregator(VotingAggregator):
    """Base: thin out each update, then take the weighted mean (``linear``) or elect signs (``ties``)."""

    merge: str = "linear"
    """``linear``: scale times the mean weighted by examples; ``ties``: sign election with ``vote`` and ``divisor``."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("merge", self.merge in ("linear", "ties"), "one of linear, ties")
        for option, plain in (("vote", "uniform"), ("divisor", "count")):
            elects = self.merge == "ties" or getattr(self, option) == plain
            self.require(option, elects, f"{plain} where aggregator.merge is linear, which elects no signs")

    def thin(self, block: Block, draws: "Draws") -> Tensor:
        """Return the block's values, float32 of the same shape, with the dropped coordinates set to zero."""
        raise NotImplementedError

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Thin out each block, then merge it."""
        draws = Draws(cohort, context, self.name)
        if self.merge == "ties":
            return self.elect(cohort, lambda block: self.thin(block, draws))
        weights = cohort.shares("examples") * self.scale
        factors = weights.float()

        def combine(block: Block) -> Tensor:
            merged: Tensor = torch.tensordot(factors, self.thin(block, draws), dims=1)
            return merged

        return Plan(combine, weights, threaded=self.coordinatewise)


@dataclass(frozen=True)
class Dare(SparsifyingAggregator, name="dare"):
    """DARE (Yu et al. 2024, arXiv 2311.03099): drop at random, divide what stays by 1 - drop_rate, then merge.

    So each coordinate keeps its mean over the draws. What is left is merged as ``merge`` says. Draws come from (seed,
    round, client, tensor).
    """

    reference: ClassVar[str] = "Yu et al. 2024, arXiv 2311.03099"
    definition: ClassVar[str] = "sparse.dare"

    drop_rate: float = 0.9
    """Probability p of dropping a coordinate, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("drop_rate", 0.0 <= self.drop_rate < 1.0, "in [0, 1)")

    def thin(self, block: Block, draws: "Draws") -> Tensor:
        """Keep each coordinate with probability 1 - p."""
        return dare(block.values, draws.of(block), drop_rate=self.drop_rate)


@dataclass(frozen=True)
class Della(SparsifyingAggregator, name="della"):
    """DELLA (Deep et al. 2024, arXiv 2406.11617): drop at random, small magnitudes more often.

    Within each row of a matrix the keep probability rises linearly with the rank of the magnitude, from
    density - window / 2 to density + window / 2; what stays is divided by its probability. Draws come from
    (seed, round, client, tensor).
    """

    reference: ClassVar[str] = "Deep et al. 2024, arXiv 2406.11617"
    definition: ClassVar[str] = "sparse.della"
    coordinatewise: ClassVar[bool] = False

    density: float = 0.3
    """Mean probability of keeping a coordinate, in (0, 1)."""
    window: float = 0.2
    """Width of the range of keep probabilities; density +- window / 2 must lie in (0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("density", 0.0 < self.density < 1.0, "in (0, 1)")
        room = 2.0 * min(self.density, 1.0 - self.density)
        self.require("window", 0.0 <= self.window < room, f"in [0, {room:g}) at density {self.density:g}")

    def thin(self, block: Block, draws: "Draws") -> Tensor:
        """Keep each coordinate with its own probability."""
        return della(block.values, draws.of(block), density=self.density, window=self.window)


@dataclass(frozen=True)
class Breadcrumbs(SparsifyingAggregator, name="breadcrumbs"):
    """Model Breadcrumbs (Davari and Belilovsky 2024, arXiv 2312.06795): drop outliers and small values.

    The floor(gamma n) largest magnitudes of each tensor are dropped, the next floor(density n) are kept.
    """

    reference: ClassVar[str] = "Davari and Belilovsky 2024, arXiv 2312.06795"
    definition: ClassVar[str] = "sparse.breadcrumbs"
    coordinatewise: ClassVar[bool] = False

    density: float = 0.85
    """Share of a tensor's coordinates that is kept, in (0, 1]."""
    gamma: float = 0.01
    """Share of a tensor's largest magnitudes that is dropped, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("density", 0.0 < self.density <= 1.0, "in (0, 1]")
        self.require("gamma", 0.0 <= self.gamma < 1.0, "in [0, 1)")

    def thin(self, block: Block, draws: "Draws") -> Tensor:
        """Keep the window of magnitudes below the outliers."""
        size = block.values[0].numel()
        return magnitude_window(block.values, top_count(self.gamma, size), top_count(self.density, size))


class Draws:
    """Uniform draws of a round, which depend on no other client or tensor, nor on how tensors are cut into blocks.

    Args:
        cohort: The round's updates.
        context: Round and seed.
        purpose: What is drawn for.
    """

    def __init__(self, cohort: Cohort, context: RoundContext, purpose: str) -> None:
        self._clients, self._context, self._purpose = cohort.ids, context, purpose
        self._own = local()  # a thread takes one tensor after the other

    def of(self, block: Block) -> Tensor:
        """Return draws in [0, 1), float32 in the block's shape; a tensor's blocks come in order, each once."""
        if block.start == 0:
            seed, number = self._context.seed, self._context.round
            self._own.generators = [
                generator(seed, number, client, self._purpose, block.name, 0) for client in self._clients
            ]
        shape = block.values.shape[1:]
        return torch.stack([torch.rand(shape, generator=own) for own in self._own.generators])

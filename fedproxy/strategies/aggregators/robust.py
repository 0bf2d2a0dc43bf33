"""Robust means: order statistics per coordinate, and bounds on whole updates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import WEIGHTINGS, Block, Cohort
from fedproxy.strategies.aggregators.passes import WeightedSum
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.aggregators.span import SpanAggregator
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.functional.robust import geometric_median, median_of_sorted, sort_clients


@dataclass(frozen=True)
class Median(Aggregator, name="median"):
    """Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498); of even counts the mean of the middle two."""

    reference: ClassVar[str] = "Yin et al. 2018, arXiv 1803.01498"
    definition: ClassVar[str] = "means.median"
    coordinatewise: ClassVar[bool] = True

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Return the middle of each coordinate."""
        return median_of_sorted(sort_clients(deltas))


@dataclass(frozen=True)
class TrimmedMean(Aggregator, name="trimmed_mean"):
    """Coordinate-wise mean without the floor(beta K) largest and smallest values (Yin et al. 2018)."""

    reference: ClassVar[str] = "Yin et al. 2018, arXiv 1803.01498"
    definition: ClassVar[str] = "means.trimmed_mean"
    coordinatewise: ClassVar[bool] = True

    beta: float = 0.1
    """Share of clients cut from each tail, in [0, 0.5)."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("beta", 0.0 <= self.beta < 0.5, "in [0, 0.5)")

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of what is left between the tails."""
        cut = int(self.beta * len(deltas) + 1e-9)
        if cut == 0:
            return deltas.mean(dim=0)
        return torch.stack(sort_clients(deltas)[cut : len(deltas) - cut]).mean(dim=0)


@dataclass(frozen=True)
class GeometricMedian(SpanAggregator, name="geometric_median"):
    """argmin_v sum_k w_k ||Delta_k - v|| over whole updates (RFA, Pillutla et al. 2022, arXiv 1912.13445).

    Solved to convergence by Weiszfeld's iteration in the span of the updates. Deviation: no smoothing; an update that
    is itself the minimiser is found exactly.
    """

    reference: ClassVar[str] = "Pillutla et al. 2022 (RFA), arXiv 1912.13445"
    definition: ClassVar[str] = "means.geometric_median_cost"

    weighting: str = "examples"
    """What a client's weight counts: ``examples``, ``tokens`` or ``uniform``."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("weighting", self.weighting in WEIGHTINGS, f"one of {', '.join(WEIGHTINGS)}")

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Iterate on the coefficients alone."""
        return geometric_median(gram, cohort.shares(self.weighting))


@dataclass(frozen=True)
class NormBound(SpanAggregator, name="norm_bound"):
    """Mean of updates scaled down to a norm of at most ``bound`` (Sun et al. 2019, arXiv 1911.07963)."""

    reference: ClassVar[str] = "Sun et al. 2019, arXiv 1911.07963"
    definition: ClassVar[str] = "means.norm_bound"

    bound: float = 1.0
    """Largest L2 norm of a whole update, > 0."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("bound", self.bound > 0.0, "> 0")

    def coefficients(self, gram: Tensor, cohort: Cohort, context: RoundContext) -> Tensor:
        """Return min(1, bound / ||Delta_k||) / K."""
        norms = gram.diagonal().sqrt()
        return torch.where(norms > self.bound, self.bound / norms, 1.0) / len(gram)


@dataclass(frozen=True)
class CenteredClipping(Aggregator, name="centered_clipping"):
    """v <- v + mean_k (Delta_k - v) min(1, tau / ||Delta_k - v||), from the last round's v (Karimireddy et al. 2021).

    arXiv 2012.10333; v is 0 in the first round and is carried in the memory.
    """

    reference: ClassVar[str] = "Karimireddy et al. 2021, arXiv 2012.10333"
    definition: ClassVar[str] = "means.centered_clipping"
    coordinatewise: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    radius: float = 1.0
    """tau: largest distance from the centre that counts in full, > 0."""
    iterations: int = 1
    """Clipping steps a round, >= 1."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("radius", self.radius > 0.0, "> 0")
        self.require("iterations", self.iterations >= 1, ">= 1")

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Clip in the span of the updates and the last centre."""
        clients = len(cohort)
        gram = torch.zeros(clients + 1, clients + 1, dtype=torch.float64)
        gram[:clients, :clients] = survey.gram
        for name, centre in memory.items():
            wide = centre.double().reshape(-1)
            gram[clients, clients] += wide @ wide
            gram[clients, :clients] += torch.stack([t.whole().double().reshape(-1) @ wide for t in cohort.read(name)])
        gram[:clients, clients] = gram[clients, :clients]
        point = torch.zeros(clients + 1, dtype=torch.float64)
        point[clients] = 1.0
        for _ in range(self.iterations):
            squares = gram.diagonal() - 2.0 * (gram @ point) + point @ gram @ point
            distances = squares[:clients].clamp(min=0.0).sqrt()
            pulls = torch.where(distances > self.radius, self.radius / distances, 1.0) / clients
            point = point * (1.0 - pulls.sum())
            point[:clients] += pulls
        new_memory: dict[str, Tensor] = {}
        from_updates = WeightedSum(point[:clients])

        def merge(block: Block) -> Tensor:
            merged = from_updates(block)
            if block.name in memory:
                last = memory[block.name].reshape(-1)[block.start : block.start + len(merged)]
                merged = merged.add(last, alpha=float(point[clients]))
            return merged

        def remember(sink: Sink) -> None:
            new_memory.update({name: tensor.float().clone() for name, tensor in sink.tensors().items()})

        return Plan(merge, point[:clients], memory=new_memory, finish=remember, threaded=True)

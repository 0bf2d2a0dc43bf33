"""Model-merging rules that look across the clients, tensor by tensor: SCE, Model Stock and Consensus."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.functional.merging import consensus, sce
from fedproxy.strategies.functional.similarity import stock_ratio


@dataclass(frozen=True)
class SCE(Aggregator, name="sce"):
    """Select, calculate, erase (FuseChat, Wan et al. 2024, arXiv 2408.07990), tensor by tensor.

    Select the coordinates of largest variance over the clients; weigh each client by the energy of what was selected,
    w_k = ||Delta_k||^2 / sum_j ||Delta_j||^2; erase the values whose sign is not that of the sum; return the weighted
    mean of the rest. Choice: the share is counted over coordinates of non-zero variance, as mergekit does.
    """

    reference: ClassVar[str] = "Wan et al. 2024 (FuseChat), arXiv 2408.07990"
    definition: ClassVar[str] = "merging.sce"

    density: float = 1.0
    """Share of coordinates selected, in (0, 1]; 1 selects all."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("density", 0.0 < self.density <= 1.0, "in (0, 1]")

    @property
    def min_clients(self) -> int:
        """Two where a share of the coordinates is selected, since a single client's vary nowhere."""
        return 1 if self.density == 1.0 else 2

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Merge one tensor."""
        return sce(deltas.reshape(len(deltas), -1), density=self.density).view(deltas.shape[1:])


@dataclass(frozen=True)
class ModelStock(Aggregator, name="model_stock"):
    """Model Stock (Jang et al. 2024, arXiv 2403.19522), tensor by tensor: t times the mean update.

    t = K cos / (1 + (K - 1) cos) with cos the mean cosine of two clients' updates. Choice: t is 0 where the denominator
    vanishes, and 1 for a single client.
    """

    reference: ClassVar[str] = "Jang et al. 2024, arXiv 2403.19522"
    definition: ClassVar[str] = "merging.model_stock"
    coordinatewise: ClassVar[bool] = True

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Find each tensor's ratio from its own Gram matrix."""
        ratios = {name: stock_ratio(gram) for name, gram in survey.grams.items()}
        return Plan(lambda block: block.values.mean(dim=0).mul_(ratios[block.name]), threaded=True)


@dataclass(frozen=True)
class Consensus(Aggregator, name="consensus"):
    """Consensus Task Arithmetic (Wang et al. 2024, arXiv 2405.07813).

    With S = sum_k Delta_k, a coordinate matters to client k where |Delta_kp| >= threshold |S_p - Delta_kp|; scale S_p
    is returned where it matters to at least ``min_clients`` clients, 0 elsewhere.
    """

    reference: ClassVar[str] = "Wang et al. 2024, arXiv 2405.07813"
    definition: ClassVar[str] = "merging.consensus"
    coordinatewise: ClassVar[bool] = True

    scale: float = 0.4
    """Factor of the sum, > 0."""
    threshold: float = 0.4
    """How large a client's own value must be against the others' sum (the paper's lambda), > 0."""
    min_clients: int = 2
    """Clients that a coordinate must matter to, >= 1; 2 removes what is used by one client alone."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("scale", self.scale > 0.0, "> 0")
        self.require("threshold", self.threshold > 0.0, "> 0")
        self.require("min_clients", self.min_clients >= 1, ">= 1")

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Keep the coordinates that enough clients use."""
        return consensus(deltas, scale=self.scale, threshold=self.threshold, min_clients=self.min_clients)

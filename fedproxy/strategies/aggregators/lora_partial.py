"""LoRA rules that train or share one factor at a time, so that a mean of factors is a mean of products."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators.base import Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import WEIGHTINGS, Block, Cohort
from fedproxy.strategies.aggregators.fedavg import LinearAggregator
from fedproxy.strategies.aggregators.passes import WeightedSum
from fedproxy.strategies.aggregators.survey import Survey


def is_lora_a(name: str) -> bool:
    """Return whether a tensor is a LoRA A factor, by PEFT's names."""
    return name.removesuffix(".weight").endswith("lora_A")


def is_lora_b(name: str) -> bool:
    """Return whether a tensor is a LoRA B factor, by PEFT's names."""
    return name.removesuffix(".weight").endswith("lora_B")


@dataclass(frozen=True)
class PartialAggregator(LinearAggregator):
    """Base: a weighted mean of the tensors that are trained this round; the others stay as they were broadcast."""

    space: ClassVar[str] = "factors"

    weighting: str = "examples"
    """What a client's weight counts: ``examples``, ``tokens`` or ``uniform``."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("weighting", self.weighting in WEIGHTINGS, f"one of {', '.join(WEIGHTINGS)}")

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Average what is trained, zero what is frozen."""
        weights = cohort.shares(self.weighting)
        mean = WeightedSum(weights)

        def merge(block: Block) -> Tensor:
            return mean(block) if self.trains(block.name, context.round) else block.values[0] * 0.0

        return Plan(merge, weights, threaded=True)


@dataclass(frozen=True)
class FFALora(PartialAggregator, name="ffa_lora"):
    """FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays at its shared start, B is trained and averaged.

    sum p_k B_k A = (sum p_k B_k) A, so the mean of factors is exact. Changes of A that clients send are ignored.
    """

    reference: ClassVar[str] = "Sun et al. 2024, arXiv 2403.12313"
    definition: ClassVar[str] = "lora.ffa_lora"

    def trains(self, name: str, round_number: int) -> bool:
        """Return True for all but LoRA A."""
        return not is_lora_a(name)


@dataclass(frozen=True)
class RoLora(PartialAggregator, name="rolora"):
    """RoLoRA (Chen et al. 2024, arXiv 2409.02346): B in odd rounds, A in even rounds, each averaged.

    Changes that clients send of the factor at rest are ignored.
    """

    reference: ClassVar[str] = "Chen et al. 2024, arXiv 2409.02346"
    definition: ClassVar[str] = "lora.rolora"

    def trains(self, name: str, round_number: int) -> bool:
        """Return True for the round's factor and for tensors outside LoRA."""
        return not (is_lora_a(name) if round_number % 2 else is_lora_b(name))


@dataclass(frozen=True)
class FedSALora(PartialAggregator, name="fedsa_lora"):
    """FedSA-LoRA (Guo et al. 2025, arXiv 2410.01463): A is shared and averaged, every client keeps its own B.

    The server's B is the mean, for the fused model. Choice: the paper fuses nothing.
    """

    reference: ClassVar[str] = "Guo et al. 2025, arXiv 2410.01463"
    definition: ClassVar[str] = "lora.fedsa_lora"
    parts: ClassVar[tuple[str, ...]] = ("personal",)

    def shares(self, name: str) -> bool:
        """Return True for all but LoRA B."""
        return not is_lora_b(name)

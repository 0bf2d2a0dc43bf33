"""LoRA rules that are exact in the products s B A: stacking, residuals and re-factoring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ConfigError
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators.base import (
    Aggregation,
    Aggregator,
    Memory,
    RoundContext,
    diagnose,
    require_finite,
)
from fedproxy.strategies.aggregators.cohort import WEIGHTINGS, Cohort
from fedproxy.strategies.aggregators.lora_pairs import CohortPairs, factor_names
from fedproxy.strategies.aggregators.passes import WeightedSum, merge_tensor
from fedproxy.strategies.aggregators.survey import Surveyor
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.lowrank import Pair, mean_residual, refactor, stack_pairs


@dataclass(frozen=True)
class ExactLoraAggregator(Aggregator):
    """Base: merges one LoRA module at a time from the clients' whole factors B_k and A_k."""

    space: ClassVar[str] = "product"

    weighting: str = "examples"
    """What a client's weight counts: ``examples``, ``tokens`` or ``uniform``."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("weighting", self.weighting in WEIGHTINGS, f"one of {', '.join(WEIGHTINGS)}")

    def merge_module(self, start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Pair | None]:
        """Merge one module.

        Args:
            start: (B, A) of the broadcast state, (out, rank) and (rank, in).
            pairs: (B_k, A_k) of the clients after training; B_k is (out, rank_k).
            shares: p_k, sum 1.

        Returns:
            The new (B, A), and factors of what every party adds to its frozen weight times s, or None.
        """
        raise NotImplementedError

    def aggregate(
        self,
        updates: Sequence[ClientUpdate],
        memory: Memory | None = None,
        context: RoundContext | None = None,
        *,
        figures: bool = True,
    ) -> Aggregation:
        """Merge the round's LoRA modules; tensors outside LoRA are averaged.

        A client of lower rank holds the first rows of A and the first columns of B. Factors are small, so the result
        always comes with its figures; ``figures`` changes nothing.

        Raises:
            ClientError: If the updates do not fit the state, or one of them or the result is not finite.
            ConfigError: If ``context`` carries no state, which products of factors need.
        """
        state = (context or RoundContext()).state
        if state is None:
            raise ConfigError(
                f"aggregator.name: {self.name!r} needs the broadcast state, got none; "
                "pass RoundContext(state=...) to aggregate()"
            )
        cohort = Cohort(updates)
        weights = cohort.shares(self.weighting)
        signs = Surveyor(cohort).run() if cohort.same_shapes() else None
        loras = CohortPairs(cohort, state)

        def merge(module: str) -> tuple[dict[str, Tensor], Pair | None]:
            new, residual = self.merge_module(loras.start(module), loras.pairs(module), weights.tolist())
            return loras.change(module, new), residual

        merged = side_by_side(merge, loras.modules)
        base = {
            name: factor.float()
            for module, (_, residual) in zip(loras.modules, merged, strict=True)
            for name, factor in zip(factor_names(module), residual or (), strict=residual is not None)
        }
        mean = WeightedSum(weights)
        sink = loras.sink(change for change, _ in merged)
        for name in loras.others:
            merge_tensor(cohort, name, mean, sink)
        require_finite(sink.tensors(), self.name, context, base)
        rows = diagnose(loras.gram((context or RoundContext()).scaling), sink)
        rows["weights"] = weights.tolist()
        if signs is None:
            return Aggregation(sink.tensors(), rows, base_change=base)
        return Aggregation(sink.tensors(), {**rows, **signs.sign_figures}, signs.conflict, base_change=base)


@dataclass(frozen=True)
class FedExLora(ExactLoraAggregator, name="fedex_lora"):
    """FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432): mean factors, and the residual into the base.

    The residual sum p_k B_k A_k - B A = sum p_k (B_k - B)(A_k - A) is sent as factors of rank (K - 1) r, to be added
    times s to every party's frozen weight.
    """

    reference: ClassVar[str] = "Singhal et al. 2025, arXiv 2410.09432"
    definition: ClassVar[str] = "lora.fedex_lora"
    parts: ClassVar[tuple[str, ...]] = ("base_change",)

    def merge_module(self, start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Pair | None]:
        """Average the factors and keep what that misses."""
        b, a = (
            sum((pair[i].double() * p for pair, p in zip(pairs, shares, strict=True)), torch.zeros(()))
            for i in range(2)
        )
        return (torch.as_tensor(b), torch.as_tensor(a)), mean_residual(pairs, shares)

    def base_rank(self, clients: int, rank: int) -> int:
        """Return (K - 1) r, the rank of the residual."""
        return (clients - 1) * rank


@dataclass(frozen=True)
class Flora(ExactLoraAggregator, name="flora"):
    """FLoRA (Wang et al. 2024, arXiv 2409.05976): A = [A_1; ...; A_K], B = [p_1 B_1, ..., p_K B_K], merged.

    The stacked product goes times s into every party's frozen weight, and the adapter starts afresh: B = 0. Deviation:
    A keeps its shared start instead of a new draw, so that all parties agree on it.
    """

    reference: ClassVar[str] = "Wang et al. 2024, arXiv 2409.05976"
    definition: ClassVar[str] = "lora.flora"
    parts: ClassVar[tuple[str, ...]] = ("base_change",)
    mixed_ranks: ClassVar[bool] = True

    def merge_module(self, start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Pair | None]:
        """Stack the clients' factors and reset the adapter."""
        return (torch.zeros_like(start[0], dtype=torch.float64), start[1].double()), stack_pairs(pairs, shares)

    def base_rank(self, clients: int, rank: int) -> int:
        """Return K r, the rank of the stacked factors."""
        return clients * rank


@dataclass(frozen=True)
class FlexLora(ExactLoraAggregator, name="flexlora"):
    """FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the truncated SVD of sum p_k B_k A_k.

    B = U S^(1/2), A = S^(1/2) V^T at the broadcast state's rank; a client of lower rank takes the leading part. By QR
    of the stacked factors, without an (out, in) matrix.
    """

    reference: ClassVar[str] = "Bai et al. 2024, arXiv 2402.11505"
    definition: ClassVar[str] = "lora.flexlora"
    mixed_ranks: ClassVar[bool] = True

    def merge_module(self, start: Pair, pairs: Sequence[Pair], shares: Sequence[float]) -> tuple[Pair, Pair | None]:
        """Re-factor the mean product."""
        return refactor(stack_pairs(pairs, shares), start[1].shape[0]), None

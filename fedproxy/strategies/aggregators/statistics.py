"""Rules that weigh coordinates by statistics which clients send beside their update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.functional.statistics import fisher, regmean


@dataclass(frozen=True)
class Fisher(Aggregator, name="fisher"):
    """Fisher merging (Matena and Raffel 2022, arXiv 2111.09832): sum_k p_k F_k Delta_k / sum_k p_k F_k.

    F_k is the diagonal Fisher information, the mean over client k's rows of the loss's squared gradient: one value per
    coordinate, sent as ``extras["fisher"]``. Choice: where no client has information, the mean weighted by p_k alone is
    taken.
    """

    reads_survey: ClassVar[bool] = False
    space: ClassVar[str] = "factors"
    reference: ClassVar[str] = "Matena and Raffel 2022, arXiv 2111.09832"
    definition: ClassVar[str] = "statistics.fisher"
    parts: ClassVar[tuple[str, ...]] = ("statistics",)
    needs_extras: ClassVar[tuple[str, ...]] = ("fisher",)

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Weigh each coordinate by the information its client has on it."""
        weights = cohort.shares("examples").float()

        def merge(block: Block) -> Tensor:
            information = (own.float().reshape(-1) for own in self._fisher(cohort, block.name))
            rows = block.values.reshape(len(cohort), -1)
            return fisher(rows, torch.stack(tuple(information)), weights).view(block.values.shape[1:])

        return Plan(merge, threaded=True)

    def _fisher(self, cohort: Cohort, name: str) -> list[Tensor]:
        found = []
        for update in cohort.updates:
            values = cohort.extra(update, "fisher", name)
            if values.shape != update.delta[name].shape or not bool((values >= 0).all()):
                raise ClientError(
                    f"client {update.client_id!r}: extras['fisher'][{name!r}] must be non-negative and of shape "
                    f"{tuple(update.delta[name].shape)}, got shape {tuple(values.shape)} with minimum "
                    f"{float(values.min()):g}; send the squared gradients' mean"
                )
            found.append(values)
        return found


@dataclass(frozen=True)
class RegMean(Aggregator, name="regmean"):
    """RegMean (Jin et al. 2023, arXiv 2212.09849, Eq 2): W = (sum_k W_k G_k)(sum_k G_k)^-1 per linear weight (out, in).

    G_k = X_k^T X_k (in, in) are the inner products of the layer's inputs, sent as ``extras["gram"]``; off-diagonal
    entries are scaled by ``shrink`` as in the paper. The equation holds for updates as it does for weights, because all
    clients start from one state. Tensors without a Gram matrix are averaged by examples. Choice: directions
    that no input has (singular sum) get that mean too.
    """

    reads_survey: ClassVar[bool] = False
    space: ClassVar[str] = "factors"
    reference: ClassVar[str] = "Jin et al. 2023, arXiv 2212.09849, Eq 2"
    definition: ClassVar[str] = "statistics.regmean"
    parts: ClassVar[tuple[str, ...]] = ("statistics",)
    needs_extras: ClassVar[tuple[str, ...]] = ("gram",)

    shrink: float = 0.9
    """Factor of the Gram matrices' off-diagonal entries, in [0, 1] (the paper's alpha)."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("shrink", 0.0 <= self.shrink <= 1.0, "in [0, 1]")

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Solve each linear weight's regression; average the rest."""
        shares = cohort.shares("examples").float()

        def merge(block: Block) -> Tensor:
            if block.values.dim() != 3 or not _all_have_gram(cohort, block.name):
                mean: Tensor = torch.tensordot(shares, block.values, dims=1)
                return mean
            grams = [self._gram(cohort, k, block) for k in range(len(cohort))]
            return regmean(block.values, grams, shares, shrink=self.shrink)

        return Plan(merge, threaded=True)

    def _gram(self, cohort: Cohort, client: int, block: Block) -> Tensor:
        gram = cohort.extra(cohort.updates[client], "gram", block.name)
        inputs = block.values.shape[-1]
        if gram.shape != (inputs, inputs):
            raise ClientError(
                f"client {cohort.ids[client]!r}: extras['gram'][{block.name!r}] must have shape ({inputs}, {inputs}), "
                f"got {tuple(gram.shape)}; send X^T X of the layer's inputs"
            )
        return gram.double()


def _all_have_gram(cohort: Cohort, name: str) -> bool:
    groups: list[Mapping[str, Tensor]] = [update.extras["gram"] for update in cohort.updates]
    return all(name in group for group in groups)

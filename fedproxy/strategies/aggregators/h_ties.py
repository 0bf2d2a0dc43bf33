"""H-TIES: FedProxy's heterogeneity-aware TIES."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedproxy.strategies.aggregators.base import Aggregator, Memory, Plan, RoundContext
from fedproxy.strategies.aggregators.cohort import Block, Cohort
from fedproxy.strategies.aggregators.survey import Survey
from fedproxy.strategies.aggregators.trimming import SCOPES, plan_trimming
from fedproxy.strategies.functional.scratch import Scratch
from fedproxy.strategies.functional.similarity import affinity_weights, heterogeneity, retention
from fedproxy.strategies.functional.voting import ratio_vote_merge


@dataclass(frozen=True)
class HTies(Aggregator, name="h_ties"):
    """H-TIES (FedProxy, ACL 2026, arXiv 2604.19015, Eqs 5-7 and 10-14).

    S_kj is the cosine of two clients' updates. Client k's weight is w_k = softmax(sum over j != k of |S_kj|), and its
    heterogeneity is h_k = 1 - mean over j != k of max(0, S_kj). It keeps the share r_k of its largest magnitudes, r0
    where h is least, falling to r0 - delta where h is most: d_k = w_k Top_{r_k}(Delta_k). gamma_p is the sign whose
    sum of |d_kp| is at least rho times the other's, else 0; m_p = sum of the d_kp of that sign / sum of their w_k.
    Choice: a single client's update is returned unchanged, with w = 1 and C = 0.
    """

    reference: ClassVar[str] = "Fan et al. 2026 (FedProxy), arXiv 2604.19015, Eqs 5-7 and 10-14"
    definition: ClassVar[str] = "h_ties.h_ties"
    coordinatewise: ClassVar[bool] = True

    r0: float = 1.0
    """Share of coordinates that the least heterogeneous client keeps, in (0, 1]."""
    delta: float = 0.2
    """How much less the most heterogeneous client keeps, in [0, r0]."""
    rho: float = 1.1
    """Least ratio of winning to losing mass, >= 1 (below, both signs could win)."""
    eps: float = 1e-12
    """Guard of the mass ratio."""
    similarity: str = "absolute"
    """Similarity that weights count: ``absolute`` is Eq (6)'s |S|, ``positive`` is max(0, S)."""
    trim_scope: str = "global"
    """``global`` trims the flattened update, ``tensor`` each tensor."""
    ignore_unmoved: bool = False
    """Give coordinates that no client moved conflict 0 instead of Eq (7)'s 1."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("r0", 0.0 < self.r0 <= 1.0, "in (0, 1]")
        self.require("delta", 0.0 <= self.delta <= self.r0, f"in [0, r0 = {self.r0}]")
        self.require("rho", self.rho >= 1.0, ">= 1")
        self.require("eps", self.eps > 0.0, "> 0")
        self.require("similarity", self.similarity in ("absolute", "positive"), "one of absolute, positive")
        self.require("trim_scope", self.trim_scope in SCOPES, f"one of {', '.join(SCOPES)}")

    @property
    def zero_unmoved_conflict(self) -> bool:
        """Whether coordinates that nobody moved get conflict 0."""
        return self.ignore_unmoved

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Weights and retention from the Gram matrix, then exact cuts."""
        weights = affinity_weights(survey.cosine, similarity=self.similarity)
        if len(cohort) == 1:
            return Plan(lambda block: block.rows[0], weights, {"retention": [1.0]})
        kept = retention(heterogeneity(survey.cosine), r0=self.r0, delta=self.delta).tolist()
        trimmers = plan_trimming(cohort, kept, scope=self.trim_scope)
        factors, scratch = weights.float(), Scratch()
        shares = factors.tolist()

        def merge(block: Block) -> Tensor:
            scaled = scratch.take(len(cohort), len(block.rows[0]), slot="scaled")
            trimmers[block.name].trim(block.rows, scaled, factors=shares)
            return ratio_vote_merge(scaled, factors, rho=self.rho, eps=self.eps, scratch=scratch)

        return Plan(merge, weights, {"retention": kept}, threaded=True)

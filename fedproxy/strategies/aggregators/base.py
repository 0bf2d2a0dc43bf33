"""The aggregator family: how a round's client updates become one change of the shared state."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ClientError, ConfigError
from fedproxy.protocol import ClientUpdate, Tensors
from fedproxy.registry import Component
from fedproxy.strategies.aggregators.cohort import Block, Cohort, Source
from fedproxy.strategies.aggregators.passes import merge_tensor
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.aggregators.survey import Survey, Surveyor
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.similarity import cosine_matrix, heterogeneity
from fedproxy.strategies.functional.voting import Sums

MOST_COSINES = 100
"""Most clients of a round whose cosines are a figure: more fill the journal, and no heat map shows them."""
_BLOCK = re.compile(r"\.(\d+)\.")
"""A block's index in the name of a tensor."""

Memory = Mapping[str, Tensor]
"""State of a rule across rounds: flat and of tensors only, so that it is saved as safetensors."""


@dataclass(frozen=True)
class Aggregation:
    """What aggregating one round gives."""

    delta: Tensors
    """Change of the shared state, in the updates' shapes and dtypes."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """Round figures of the report; figures per client are lists in sorted client order, ``cosine`` a list of rows."""
    conflict: Tensors | None = None
    """float32 conflict C per coordinate (FedProxy Eq 7), in [0, 1], for the next round's broadcast."""
    memory: Memory = field(default_factory=dict)
    """The rule's state after this round, to be given back in the next one."""
    base_change: dict[str, Tensor] = field(default_factory=dict)
    """LoRA factors (float32, PEFT names) whose product times s every party adds to its frozen weights; mostly empty."""

    def conflict_by_layer(self) -> dict[str, float]:
        """Return the mean conflict over the coordinates of every block, by its index; others are left out."""
        blocks: dict[int, list[Tensor]] = {}
        for name, values in (self.conflict or {}).items():
            if (found := _BLOCK.search(name)) is not None:
                part = torch.stack([values.sum(dtype=torch.float64), torch.tensor(values.numel(), dtype=torch.float64)])
                blocks.setdefault(int(found[1]), []).append(part)
        sums = {block: torch.stack(parts).sum(dim=0) for block, parts in sorted(blocks.items())}
        return {str(block): float(total / count) for block, (total, count) in sums.items()}


@dataclass(frozen=True)
class RoundContext:
    """What a few rules need beyond the updates; the defaults do for all others."""

    round: int = 1
    """Round number, from 1."""
    seed: int = 0
    """Seed of the run, for rules that draw at random."""
    state: Tensors | None = None
    """The broadcast state phi^t, for rules that work on whole LoRA matrices."""
    scaling: float = 1.0
    """LoRA scaling s: alpha / r, or alpha / sqrt(r) with rsLoRA."""


@dataclass
class Plan:
    """How one round's updates are merged, once the global facts are known."""

    merge: Callable[[Block], Tensor]
    """Maps a block of deltas to merged values, float32, one per coordinate."""
    weights: Tensor | None = None
    """float64 (clients,): weights to report, if the rule has any."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """Further round figures."""
    memory: Memory = field(default_factory=dict)
    """State for the next round."""
    finish: Callable[[Sink], None] | None = None
    """Completes what was written, after the last block."""
    threaded: bool = False
    """``merge`` may be called for blocks of different tensors side by side."""
    shows_faults: bool = False
    """What is not finite in an update is not finite in the merged one either, which alone is checked then."""


@dataclass(frozen=True)
class Aggregator(Component, family="aggregator"):
    """Base of all aggregation rules; the fields of a subclass are its options.

    A simple rule overrides :meth:`combine` alone. A rule that weighs clients by what it sees overrides :meth:`weigh`,
    and one that needs more (thresholds, state, a finishing step) overrides :meth:`plan`.
    """

    linear: ClassVar[bool] = False
    """The result is a weighted sum with weights that do not depend on the updates: may run under secure aggregation."""
    mixed_ranks: ClassVar[bool] = False
    """Clients may send LoRA factors of different ranks."""
    stateful: ClassVar[bool] = False
    """Keeps memory across rounds."""
    space: ClassVar[str] = "any"
    """Where the rule is defined: ``factors`` (LoRA A and B), ``product`` (s B A) or ``any``."""
    aggregates: ClassVar[bool] = True
    """False where clients are never merged: every client keeps a state of its own."""
    coordinatewise: ClassVar[bool] = False
    """Each merged coordinate depends on that coordinate alone, so that tensors may come in flat blocks."""
    combines_by_gram: ClassVar[bool] = False
    """The result is sum_k c_k Delta_k with coefficients, reported as weights, from inner products of updates alone."""
    reads_survey: ClassVar[bool] = True
    """:meth:`weigh` or :meth:`plan` reads the survey, so that updates are read once more before they are merged."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Round parts that the rule needs, by name: ``base_change`` where part of the result goes into every party's frozen
    weights (:attr:`Aggregation.base_change`), ``personal`` where clients keep tensors (:meth:`shares`)."""
    needs_extras: ClassVar[tuple[str, ...]] = ()
    """Groups that every update must carry in ``extras``."""
    reference: ClassVar[str] = ""
    """Where the rule is from."""
    definition: ClassVar[str] = ""
    """What states the rule in plain torch, a function of :mod:`fedproxy.strategies.functional` such as ``ties.ties``; a
    test holds the rule equal to it."""

    def trains(self, name: str, round_number: int) -> bool:
        """Return whether clients train this tensor in this round; others they leave as broadcast."""
        return True

    def shares(self, name: str) -> bool:
        """Return whether a tensor is common to all clients; else every client goes on from its own last value."""
        return True

    def base_rank(self, clients: int, rank: int) -> int:
        """Return the rank of what a round of ``clients`` updates moves into a frozen weight."""
        return 0

    @property
    def sum_part(self) -> Mapping[str, Any]:
        """Name and options of the round part by which clients send what is merged from sums over them alone.

        A rule that has one may run under secure aggregation, and overrides :meth:`merge_sums`. Linear rules need none.
        """
        return {}

    def merge_sums(self, sums: Mapping[str, Sums]) -> Aggregation:
        """Merge a round of which sums over its clients alone are known, by tensor."""
        raise NotImplementedError(f"{type(self).__name__} must override merge_sums() where it has a sum_part")

    @property
    def min_clients(self) -> int:
        """Fewest clients a round with which the rule works."""
        return 1

    @property
    def zero_unmoved_conflict(self) -> bool:
        """Whether coordinates that nobody moved get conflict 0 instead of Eq (7)'s 1."""
        return False

    def combine(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """Merge one tensor of all clients.

        Args:
            deltas: float32 (clients, *shape); flat (clients, n) pieces of it if the rule is ``coordinatewise``.
            weights: float32 (clients, 1, ..., 1), what :meth:`weigh` gave.

        Returns:
            float32 (*shape).
        """
        raise NotImplementedError(f"{type(self).__name__} must override combine() or plan()")

    def weigh(self, cohort: Cohort, survey: Survey) -> Tensor:
        """Return the clients' weights, float64 (clients,); equal ones unless overridden."""
        return cohort.shares("uniform")

    def plan(self, cohort: Cohort, survey: Survey, memory: Memory, context: RoundContext) -> Plan:
        """Decide how the round is merged, from the survey of all updates."""
        weights = self.weigh(cohort, survey)

        def merge(block: Block) -> Tensor:
            shape = (-1,) + (1,) * (block.values.dim() - 1)
            return self.combine(block.values, weights.float().view(shape))

        return Plan(merge, threaded=self.coordinatewise)

    def linear_weights(self, updates: Sequence[ClientUpdate], context: RoundContext) -> Tensor:
        """Return the weights of a ``linear`` rule, float64 (clients,) in the order of ``updates``, sorted by client.

        Args:
            updates: One per client; their counts are read, their tensors need not be there.
            context: Round and seed.
        """
        cohort, unseen = Cohort(updates), Survey({}, {}, 0.0, 1.0)
        weights = self.plan(cohort, unseen, {}, context).weights
        return self.weigh(cohort, unseen) if weights is None else weights

    def aggregate(
        self,
        updates: Sequence[ClientUpdate],
        memory: Memory | None = None,
        context: RoundContext | None = None,
        *,
        figures: bool = True,
    ) -> Aggregation:
        """Merge the updates of one round, in sorted client order and float32, one tensor at a time.

        Args:
            updates: One per client; left untouched.
            memory: What the previous round's aggregation returned; None in the first round.
            context: Round, seed and state, for rules that need them.
            figures: False leaves out diagnostics and conflict map, and the work that only they need.

        Raises:
            ClientError: If the updates do not fit each other, or one of them or the result is not finite.
            ConfigError: If the rule cannot be used this way.
        """
        cohort = self._cohort(updates)
        surveyor = self._surveyor(cohort, signs=figures) if figures or self._surveys_first else None
        survey = surveyor.run() if surveyor is not None and self._surveys_first else Survey({}, {}, 0.0, 1.0)
        plan = self.plan(cohort, survey, memory or {}, context or RoundContext())
        sink = Sink()

        def merge(name: str) -> None:
            merge_tensor(
                cohort,
                name,
                plan.merge,
                sink,
                whole=not self.coordinatewise,
                watch=None if self._surveys_first else surveyor,
                surveyed=self._surveys_first,
                shows_faults=plan.shows_faults,
            )

        if plan.threaded:
            side_by_side(merge, cohort.names)
        else:
            for name in cohort.names:
                merge(name)
        if plan.finish is not None:
            plan.finish(sink)
        require_finite(sink.tensors(), self.name, context, plan.memory)
        if surveyor is None or not figures:
            return Aggregation(sink.tensors(), memory=plan.memory)
        survey = surveyor.survey()
        rows = {**diagnose(survey.gram, sink), **survey.sign_figures, **plan.diagnostics}
        if plan.weights is not None:
            rows["weights"] = plan.weights.tolist()
        return Aggregation(sink.tensors(), rows, survey.conflict, plan.memory)

    def _cohort(self, updates: Sequence[ClientUpdate]) -> Cohort:
        cohort = Cohort(updates)
        if not cohort.names:
            raise ClientError("aggregation needs at least one tensor, got updates without any; send what was trained")
        if not self.aggregates and len(cohort) > 1:
            raise ConfigError(
                f"aggregator.name: {self.name!r} does not merge clients, got {len(cohort)} updates; "
                "aggregate each client alone, or choose another aggregator"
            )
        cohort.require_extras(self.needs_extras, self.name)
        return cohort

    @property
    def _surveys_first(self) -> bool:
        simple = type(self).plan is Aggregator.plan and type(self).weigh is Aggregator.weigh
        return self.reads_survey and not simple

    def _surveyor(self, cohort: Cohort, *, signs: bool) -> Surveyor:
        ignored, decides = self.zero_unmoved_conflict, self._surveys_first
        return Surveyor(cohort, ignore_unmoved=ignored, signs=signs, sink=Sink(), decides=decides)


def require_finite(merged: Tensors, rule: str, context: RoundContext | None, memory: Memory | None = None) -> None:
    """Refuse a result that no state may take in.

    Args:
        merged: The merged update; what lies in a file is read one part at a time.
        rule: Name of the rule.
        context: Tells the round.
        memory: What the rule keeps for the next round.

    Raises:
        ClientError: If a value is NaN or infinite; names rule, round and tensor.
    """
    for tensors in (merged, memory or {}):
        for name in tensors:
            for part in Source.of(tensors, name).parts():
                # A sum is quick, and no number only where a value is none, or all of them together are too large.
                if not math.isfinite(float(part.sum())) and not bool(part.isfinite().all()):
                    raise ClientError(
                        f"aggregator.name={rule} gives NaN or infinity for tensor {name!r} in round "
                        f"{(context or RoundContext()).round}; lower client.lr or choose another aggregator, then "
                        "resume=auto"
                    )


def diagnose(gram: Tensor, merged: Sink) -> dict[str, Any]:
    """Return the round figures that every rule gives.

    Choice: the cosines of more than ``MOST_COSINES`` clients are None, as they grow with the square of the clients.

    Args:
        gram: float64 (clients, clients), inner products of whole updates.
        merged: What the merged update was written into.
    """
    cosine = cosine_matrix(gram)
    return {
        "heterogeneity": heterogeneity(cosine).tolist(),
        "cosine": cosine.tolist() if len(cosine) <= MOST_COSINES else None,
        "kept_density": merged.nonzero / max(1, merged.size),
        "update_norms": gram.diagonal().clamp(min=0.0).sqrt().tolist(),
    }

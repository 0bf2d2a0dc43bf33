"""Any rule in product space: merge the changes of s B A per weight matrix instead of the factors, then re-factor.

Rules whose result is a combination of the updates never form an (out, in) matrix: their coefficients come from the
exact Gram matrix of the products, and stacked factors are re-factored by QR and SVD. Other rules see one dense
matrix of all clients at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

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
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.lora_pairs import CohortPairs
from fedproxy.strategies.aggregators.passes import WeightedSum, merge_tensor
from fedproxy.strategies.aggregators.survey import Survey, Surveyor
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.lowrank import refactor, refactor_dense, stack_pairs


def aggregate_products(
    rule: Aggregator,
    updates: Sequence[ClientUpdate],
    memory: Memory | None = None,
    context: RoundContext | None = None,
) -> Aggregation:
    """Merge one round in product space (``federation.space: product``).

    The new factors are the best approximation, at the broadcast rank, of the broadcast product plus the merged change.
    Cosines, heterogeneity and norms are those of the products; signs and conflict are those of the factors, which is
    what the conflict regularizer acts on.

    Args:
        rule: The aggregator; one that is exact by itself (``space = "product"``) is simply applied.
        updates: One per client; left untouched.
        memory: What the previous round's aggregation returned.
        context: Must carry the broadcast state and the LoRA scaling.

    Raises:
        ConfigError: If the rule is defined on factors alone, or ``context`` carries no state.
        ClientError: If the updates do not fit the state, or one of them or the result is not finite.
    """
    context = context or RoundContext()
    if rule.space == "product":
        return rule.aggregate(updates, memory, context)
    if rule.space == "factors" or not rule.aggregates:
        raise ConfigError(
            f"federation.space: aggregator {rule.name!r} works on LoRA factors and cannot merge products; "
            "use federation.space=factors or another aggregator"
        )
    if context.state is None:
        raise ConfigError("federation.space: product needs the broadcast state, got none; pass RoundContext(state=...)")
    cohort = Cohort(updates)
    factors = Surveyor(cohort, ignore_unmoved=rule.zero_unmoved_conflict).run() if cohort.same_shapes() else None
    loras = CohortPairs(cohort, context.state)
    merge = _merge_by_coefficients if rule.combines_by_gram else _merge_dense
    result = merge(rule, cohort, loras, memory or {}, context)
    require_finite(result.delta, rule.name, context, result.memory)
    if factors is None:
        return replace(result, conflict=None)
    return replace(result, diagnostics={**result.diagnostics, **factors.sign_figures}, conflict=factors.conflict)


def _merge_by_coefficients(
    rule: Aggregator, cohort: Cohort, loras: CohortPairs, memory: Memory, context: RoundContext
) -> Aggregation:
    gram = loras.gram(context.scaling)
    plan = rule.plan(cohort, Survey({"": gram}, {}, 0.0, 1.0), memory, context)
    if plan.weights is None:
        raise ConfigError(
            f"aggregator.name={rule.name}: a rule with combines_by_gram gives its coefficients as Plan.weights, got "
            "none; give them, or set combines_by_gram to False"
        )
    coefficients = plan.weights.tolist()

    def changed(module: str) -> dict[str, Tensor]:
        pairs = [loras.start(module), *loras.differences(module)]
        return loras.change(module, refactor(stack_pairs(pairs, [1.0, *coefficients]), len(pairs[0][1])))

    mean = WeightedSum(plan.weights)
    sink = loras.sink(side_by_side(changed, loras.modules))
    for name in loras.others:
        merge_tensor(cohort, name, mean, sink)
    figures = diagnose(gram, sink)
    figures["weights"] = coefficients
    return Aggregation(sink.tensors(), {**figures, **plan.diagnostics}, memory=plan.memory)


def _merge_dense(
    rule: Aggregator, cohort: Cohort, loras: CohortPairs, memory: Memory, context: RoundContext
) -> Aggregation:
    views = [
        replace(update, delta=ProductDelta(loras, k, cohort.updates[k], context.scaling))
        for k, update in enumerate(cohort.updates)
    ]
    merged = rule.aggregate(views, memory, context)

    def changed(module: str) -> dict[str, Tensor]:
        b, a = loras.start(module)
        target = b.double() @ a.double() + merged.delta[module].double() / context.scaling
        return loras.change(module, refactor_dense(target, a.shape[0]))

    factors = {name: tensor for part in side_by_side(changed, loras.modules) for name, tensor in part.items()}
    return replace(merged, delta={name: merged.delta[name] for name in loras.others} | factors)


class ProductDelta(Mapping[str, Tensor]):
    """A client's update with each LoRA pair replaced by the dense change s (B_k A_k - B A), made when asked for.

    Args:
        loras: The cohort's pairs.
        index: The client's place in the cohort.
        update: The client's update.
        scaling: s.
    """

    def __init__(self, loras: CohortPairs, index: int, update: ClientUpdate, scaling: float) -> None:
        self._loras, self._index, self._update, self._scaling = loras, index, update, scaling
        self._names = tuple(sorted([*loras.modules, *loras.others]))

    def __getitem__(self, name: str) -> Tensor:
        """Return a module's dense change, float32 (out, in), or a tensor outside LoRA as it was sent."""
        if name in self._loras.modules:
            b, a = self._loras.difference(name, self._index)
            return (self._scaling * (b @ a)).float()
        return self._update.delta[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of modules and of tensors outside LoRA, sorted."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of modules and of tensors outside LoRA."""
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without forming it."""
        if name in self._loras.modules:
            b, a = self._loras.start(name)
            return (b.shape[0], a.shape[1])
        return tuple(self._update.delta[name].shape)

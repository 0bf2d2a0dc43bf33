"""What the runs of a comparison say: scores, paired differences, share of the ceiling's gain, cost and exposure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedproxy.errors import EvaluationError
from fedproxy.metric_facts import HEADLINES, facts
from fedproxy.reporting.comparison.answers import (
    Floats,
    Score,
    answers_of,
    common_metric,
    over_seeds,
    task_scores,
)
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.scores import value_of
from fedproxy.reporting.statistics import Interval, gain_recovered, holm, paired_bootstrap, sign_flip_test
from fedproxy.task_means import mean_known

SEED = 0
"""Seed of bootstrap and randomisation test: the same answers give the same intervals and p-values."""
FUSED = "fused"
"""The model that stands for a method unless a study says otherwise."""
_UNTOUCHED = ""
"""Label of the untouched target, which no method can have."""
COSTS = (
    "upload_bytes",
    "download_bytes",
    "client_seconds",
    "server_seconds",
    "trainable_parameters",
    "proxy_parameters",
)


@dataclass(frozen=True)
class Difference:
    """A method minus another on the same questions, answers averaged over the seeds that both have."""

    seeds: Sequence[int]
    interval: Interval
    """Mean over tasks, a share as a fraction, with the 95 % interval of a paired bootstrap over questions; above 0 the
    first is better, also where lower values are."""
    p_value: float
    """Sign-flip randomisation test on the same mean."""
    holm_p_value: float | None = None
    """Holm-corrected over the methods of the table."""


@dataclass(frozen=True)
class MethodResult:
    """One row of the comparison."""

    label: str
    recipe: str
    scored: str
    """Which model's answers these are: fused, target or proxy_tuned."""
    seeds: Sequence[int]
    scores: Mapping[str, Score]
    """Task, and ``mean``, to the comparison's metric."""
    answer_nll: float | None
    """Nats per answer token, of all a task's answers together, mean over tasks and seeds: as in the runs' reports."""
    rounds: int
    cost: Mapping[str, float | None]
    """Means over seeds of the report's costs, and ``examples``: rows seen in training."""
    exposure: Mapping[str, float | None]
    """``disclosed_parameter_share``, and mean accuracy of ``proxy`` and ``proxy_tuned`` alone, means over seeds."""
    against_zero_shot: Difference | None = None
    """None where both gave the same answers."""
    against_ceiling: Difference | None = None
    recovered: Interval | None = None
    """Share of the ceiling's gain over zero-shot; None where the ceiling does not gain."""
    reference_minus: Difference | None = None
    """The reference method minus this one."""
    reference_minus_nll: Interval | None = None
    """The same in nats per answer token, mean over questions and tasks; below 0 the reference is better."""


@dataclass(frozen=True)
class Analysis:
    """All methods, and what they are measured against."""

    metric: str
    zero_shot: Mapping[str, Score]
    """The untouched target."""
    zero_shot_nll: float | None
    """Its answer NLL, of the same kind."""
    ceiling: str | None
    reference: str | None
    methods: Sequence[MethodResult] = field(default_factory=tuple)


Runs = Mapping[str, Sequence[Record]]
"""Method to its records, one per seed."""


def analyse(
    runs: Runs, *, scored: Mapping[str, str] | None = None, ceiling: str | None = None, reference: str | None = None
) -> Analysis:
    """Compare methods on the same questions.

    Args:
        runs: Method to its finished records; a method without one is left out.
        scored: Method to the model that stands for it, where that is not the fused one.
        ceiling: The method that is the upper bound, e.g. centralised tuning.
        reference: The method that all others are compared with.

    Raises:
        EvaluationError: If no run scored the target, one did not score the model that stands for its method, or answers
            have no metric in common.
    """
    scored = scored or {}
    runs = {label: sorted(records, key=lambda record: record.seed) for label, records in runs.items() if records}
    records = [record for own in runs.values() for record in own]
    metric = common_metric(records)
    if metric is None:
        raise EvaluationError(
            f"the questions have none of {', '.join(HEADLINES)} in common, by which methods could be compared"
        )
    methods = {label: _Method(label, own, scored.get(label, FUSED), metric) for label, own in runs.items()}
    zero_shot = _Method(_UNTOUCHED, _with_target(records), "target", metric)
    top = methods.get(ceiling) if ceiling else None
    chosen = methods.get(reference) if reference else None
    plain = _corrected({label: _difference(method, zero_shot) for label, method in methods.items()})
    below = _corrected({label: _difference(method, top) if top else None for label, method in methods.items()})
    above = _corrected({label: _difference(chosen, method) if chosen else None for label, method in methods.items()})
    rows = [
        MethodResult(
            label=label,
            recipe=method.records[-1].report.run.recipe,
            scored=method.scored,
            seeds=method.seeds,
            scores=method.scores,
            answer_nll=method.nll(),
            rounds=len(method.records[-1].report.rounds),
            cost=_costs(method.records),
            exposure=_exposure(method.records, metric),
            against_zero_shot=plain[label],
            against_ceiling=below[label],
            recovered=_recovered(method, zero_shot, top) if top else None,
            reference_minus=above[label],
            reference_minus_nll=(
                _nll_difference(chosen, method) if chosen and chosen is not method and metric != "answer_nll" else None
            ),
        )
        for label, method in methods.items()
    ]
    return Analysis(
        metric=metric,
        zero_shot=zero_shot.scores,
        zero_shot_nll=zero_shot.nll(),
        ceiling=top.label if top else None,
        reference=chosen.label if chosen else None,
        methods=rows,
    )


def _with_target(records: Sequence[Record]) -> list[Record]:
    """Return one record per seed that scored the target."""
    found = {record.seed: record for record in records if "target" in record.answers}
    if not found:
        raise EvaluationError("no run scored the target; add it to evaluation.models of one recipe")
    return [found[seed] for seed in sorted(found)]


class _Method:
    """A method's answers to all questions, (questions, seeds) per task."""

    def __init__(self, label: str, records: Sequence[Record], scored: str, metric: str) -> None:
        for record in records:
            if scored not in record.answers:
                raise EvaluationError(f"{label}, seed {record.seed}, scored no {scored}; add it to evaluation.models")
        self.label, self.records, self.scored = label, records, scored
        self.seeds = [record.seed for record in records]
        self.answers = answers_of(records, scored, metric)
        self.nlls = answers_of(records, scored, "answer_nll") if self._has("answer_nll") else None
        self.scores = task_scores(self.answers, self.seeds)
        self._better = 1.0 if facts(metric).higher_is_better else -1.0

    def _has(self, metric: str) -> bool:
        return all(metric in own.values for record in self.records for own in record.answers[self.scored].values())

    def over(self, seeds: Sequence[int]) -> list[Floats]:
        """Return per task the answers averaged over these seeds, signed such that more is better."""
        return [self._better * values for values in self._over(self.answers, seeds)]

    def nlls_over(self, seeds: Sequence[int]) -> list[Floats] | None:
        """Return the same of the right answers' NLL, where every question has it."""
        return None if self.nlls is None else self._over(self.nlls, seeds)

    def _over(self, answers: Mapping[str, Floats], seeds: Sequence[int]) -> list[Floats]:
        columns = [self.seeds.index(seed) for seed in seeds]
        return over_seeds({task: values[:, columns] for task, values in answers.items()})

    def nll(self) -> float | None:
        """Return the reports' answer NLL, where every seed's has one."""
        scores = [record.report.scores.get(self.scored, {}) for record in self.records]
        return _mean([own.get("mean", {}).get("answer_nll") for own in scores])


def _recovered(method: _Method, zero_shot: _Method, ceiling: _Method) -> Interval | None:
    seeds = _shared(method, ceiling)
    if not seeds:
        return None
    columns = zero_shot.over(_known(zero_shot, seeds)), method.over(seeds), ceiling.over(seeds)
    return gain_recovered(*columns, np.random.default_rng(SEED))


def _shared(one: _Method, other: _Method) -> list[int]:
    return [seed for seed in one.seeds if seed in other.seeds]


def _known(zero_shot: _Method, seeds: Sequence[int]) -> list[int]:
    """Return the seeds of the target's answers to use: the target has no randomness, any seed's will do."""
    return [seed for seed in seeds if seed in zero_shot.seeds] or zero_shot.seeds


def _difference(one: _Method, other: _Method) -> Difference | None:
    """Return one minus other; None where all answers are alike or no seed is in both."""
    seeds = one.seeds if other.label == _UNTOUCHED else _shared(one, other)
    if not seeds:
        return None
    theirs = other.over(_known(other, seeds))
    changes = [mine - their for mine, their in zip(one.over(seeds), theirs, strict=True)]
    if not any(change.any() for change in changes):
        return None
    interval = paired_bootstrap(changes, np.random.default_rng(SEED))
    return Difference(seeds, interval, sign_flip_test(changes, np.random.default_rng(SEED)))


def _nll_difference(one: _Method, other: _Method) -> Interval | None:
    seeds = _shared(one, other)
    mine, theirs = one.nlls_over(seeds), other.nlls_over(seeds)
    if not seeds or mine is None or theirs is None:
        return None
    return paired_bootstrap([a - b for a, b in zip(mine, theirs, strict=True)], np.random.default_rng(SEED))


def _corrected(differences: Mapping[str, Difference | None]) -> dict[str, Difference | None]:
    """Return the differences of one table with Holm-corrected p-values."""
    adjusted = holm({label: found.p_value for label, found in differences.items() if found})
    return {
        label: replace(found, holm_p_value=adjusted[label]) if found else None for label, found in differences.items()
    }


def _costs(records: Sequence[Record]) -> dict[str, float | None]:
    costs = {name: _mean([getattr(record.report.cost, name) for record in records]) for name in COSTS}
    return {**costs, "examples": _mean([record.examples for record in records])}


def _exposure(records: Sequence[Record], metric: str) -> dict[str, float | None]:
    def alone(model: str) -> float | None:
        found = [value_of(record.report.scores.get(model, {}).get("mean"), metric) for record in records]
        return _mean([value.value if value else None for value in found])

    shares = [record.report.exposure.disclosed_parameter_share for record in records]
    return {
        "disclosed_parameter_share": _mean(shares),
        "proxy": alone("proxy"),
        "proxy_tuned": alone("proxy_tuned"),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over seeds, or None where a seed lacks the value."""
    return None if None in values else mean_known(values)

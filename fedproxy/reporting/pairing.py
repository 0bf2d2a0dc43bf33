"""Two models on the same questions: difference, bootstrap interval and McNemar's test, Holm-corrected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from fedproxy.errors import EvaluationError
from fedproxy.metric_facts import facts
from fedproxy.reporting import formatting as show
from fedproxy.reporting.samples import Evaluation, common_metric, kept_models, load_evaluation, require_comparable
from fedproxy.reporting.scores import Value
from fedproxy.reporting.statistics import Interval, holm, mcnemar_exact, paired_bootstrap, sign_flip_test
from fedproxy.reporting.tables import Table

NLL_DIFFERENCE = "answer NLL difference (95 %)"
"""Head of a column of paired differences in nats per answer token."""
NLL = "answer_nll"
MCNEMAR, SIGN_FLIP = "McNemar", "sign-flip"
"""The two tests: of answers that are right or wrong, and of any others."""
SEED = 0
"""Seed of the bootstrap: the same samples give the same interval."""


@dataclass(frozen=True)
class PairedDifference:
    """Second minus first on the same questions."""

    name: str
    metric: str
    questions: int
    difference: Interval
    """Mean over tasks of the difference, as a fraction."""
    only_first: int
    """Questions that only the first got right, or at which it was better, all tasks pooled."""
    only_second: int
    p_value: float
    """By :attr:`test`; McNemar's on the pooled questions."""
    holm_p_value: float
    """The same, Holm-corrected over the rows of its table."""
    answer_nll: Interval | None = None
    """Difference in nats per answer token, mean over questions and tasks; below 0 the second is better."""
    test: str = MCNEMAR
    """Where answers of a table are not right or wrong alone, as means over clients are not, :data:`SIGN_FLIP`."""


def paired_differences(pairs: Mapping[str, tuple[Evaluation, Evaluation]], metric: str) -> list[PairedDifference]:
    """Return one difference per named pair, p-values Holm-corrected over all of them.

    Args:
        pairs: Row name to (first, second); each pair must be comparable (:func:`require_comparable`).
        metric: A metric that every question has.
    """
    counts = {name: _discordant(first, second, metric) for name, (first, second) in pairs.items()}
    answers = (value for pair in pairs.values() for one in pair for values in one.by_task(metric) for value in values)
    test = MCNEMAR if all(value in (0, 1) for value in answers) else SIGN_FLIP
    p_values = {name: _p_value(*pairs[name], metric, count, test) for name, count in counts.items()}
    corrected = holm(p_values)
    return [
        PairedDifference(
            name,
            metric,
            sum(map(len, first.questions.values())),
            _interval(first, second, metric),
            *counts[name],
            p_values[name],
            corrected[name],
            _interval(first, second, NLL) if metric != NLL and first.has(NLL) and second.has(NLL) else None,
            test,
        )
        for name, (first, second) in pairs.items()
    ]


def _differences(first: Evaluation, second: Evaluation, metric: str) -> list[np.ndarray]:
    pairs = zip(first.by_task(metric), second.by_task(metric), strict=True)
    return [np.subtract(after, before) for before, after in pairs]


def _interval(first: Evaluation, second: Evaluation, metric: str) -> Interval:
    return paired_bootstrap(_differences(first, second, metric), np.random.default_rng(SEED))


def _p_value(first: Evaluation, second: Evaluation, metric: str, count: tuple[int, int], test: str) -> float:
    if test == MCNEMAR:
        return mcnemar_exact(*count)
    return sign_flip_test(_differences(first, second, metric), np.random.default_rng(SEED))


def _discordant(first: Evaluation, second: Evaluation, metric: str) -> tuple[int, int]:
    pairs = zip(chain(*first.by_task(metric)), chain(*second.by_task(metric)), strict=True)
    changes = [after - before for before, after in pairs]
    worse, better = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    return (worse, better) if facts(metric).higher_is_better else (better, worse)


def evaluations_of(run: str | Path) -> dict[str, Evaluation]:
    """Return the samples of every model of a run that were kept.

    Raises:
        EvaluationError: If a file is broken.
    """
    return {model: load_evaluation(run, model) for model in kept_models(run)}


def against_target(evaluations: Mapping[str, Evaluation]) -> list[PairedDifference]:
    """Return each model's difference to the target of the same run; empty where samples were not kept.

    Raises:
        EvaluationError: If samples do not fit together.
    """
    if "target" not in evaluations or len(evaluations) < 2:
        return []
    target = evaluations["target"]
    others = {model: evaluation for model, evaluation in evaluations.items() if model != "target"}
    for evaluation in others.values():
        require_comparable(target, evaluation)
    metric = common_metric(list(evaluations.values()))
    return paired_differences({model: (target, evaluation) for model, evaluation in others.items()}, metric)


def on_sources(evaluations: Mapping[str, Evaluation]) -> list[PairedDifference]:
    """Return the fused model's difference in answer NLL to the target on every source without choices.

    Empty where samples were not kept, or there is no such source.

    Raises:
        EvaluationError: If samples do not fit together.
    """
    if not {"target", "fused"} <= evaluations.keys():
        return []
    target, fused = evaluations["target"], evaluations["fused"]
    pairs = {
        source: (_only(target, source), _only(fused, source))
        for source, questions in target.questions.items()
        if all("acc" not in sample and NLL in sample for sample in questions.values())
    }
    if not pairs:
        return []
    for pair in pairs.values():
        require_comparable(*pair)
    return paired_differences(pairs, NLL)


@dataclass(frozen=True)
class RunDifferences:
    """What separates two runs, second minus first."""

    models: Sequence[PairedDifference]
    """One row per model that both runs kept samples of and that did not answer exactly alike, all tasks."""
    tasks: Sequence[PairedDifference]
    """One row per task, for the last of these models (``fused`` where there is one)."""
    alike: Sequence[str]
    """Models with the same samples in both runs, an untouched target for instance: they test nothing, and as rows they
    would only weaken Holm's correction."""


def between_runs(first: str | Path, second: str | Path) -> RunDifferences:
    """Pair two runs by question.

    Raises:
        EvaluationError: If they share no model, or their tasks, prompts, questions or versions differ.
    """
    models = [model for model in kept_models(first) if model in kept_models(second)]
    if not models:
        raise EvaluationError(
            f"{first} and {second} share no model with kept samples (evaluation/<model>.samples.jsonl); "
            "evaluate both runs first"
        )
    pairs = {model: (load_evaluation(first, model), load_evaluation(second, model)) for model in models}
    for pair in pairs.values():
        require_comparable(*pair)
    alike = [model for model, (one, other) in pairs.items() if one.questions == other.questions]
    tested = {model: pair for model, pair in pairs.items() if model not in alike}
    if not tested:
        return RunDifferences([], [], alike)
    metric = common_metric([evaluation for pair in tested.values() for evaluation in pair])
    one, other = list(tested.values())[-1]
    by_task = {task: (_only(one, task), _only(other, task)) for task in one.questions}
    return RunDifferences(paired_differences(tested, metric), paired_differences(by_task, metric), alike)


def _only(evaluation: Evaluation, task: str) -> Evaluation:
    questions = {task: evaluation.questions[task]} if task in evaluation.questions else {}
    return Evaluation(evaluation.name, evaluation.settings, questions)


def paired_table(rows: Sequence[PairedDifference], head: str = "model") -> Table:
    """Return the differences as finished text: points, 95 % interval, questions won and lost, p-values."""
    metric = rows[0].metric
    columns = [head, "questions", f"{metric} difference", "95 % interval", "lost / won", f"{rows[0].test} p", "Holm p"]
    with_nll = all(row.answer_nll for row in rows)
    return Table(
        [*columns, NLL_DIFFERENCE] if with_nll else columns,
        [
            [
                row.name,
                str(row.questions),
                show.measured_change(metric, Value(row.difference.estimate)),
                show.measured_interval(metric, row.difference.low, row.difference.high),
                f"{row.only_first} / {row.only_second}",
                show.p_value(row.p_value),
                show.p_value(row.holm_p_value),
                *([show.with_interval(row.answer_nll)] if with_nll and row.answer_nll else []),
            ]
            for row in rows
        ],
    )


def paired_hint(rows: Sequence[PairedDifference]) -> str:
    """Return what a reader of :func:`paired_table` should know."""
    metric = rows[0].metric
    counted = "Points" if facts(metric).share else f"{metric}, mean over questions and tasks"
    better = "" if facts(metric).higher_is_better else " (below 0 is better)"
    test = "McNemar's exact test" if rows[0].test == MCNEMAR else "a sign-flip randomisation test"
    return (
        f"{counted}{better}, with the 95 % interval of a paired bootstrap over the same questions; p is {test}, "
        "Holm-corrected over the rows."
    )

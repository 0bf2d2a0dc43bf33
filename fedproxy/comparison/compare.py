"""From a study to its report: check, run, analyse, write."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedproxy.comparison.arguments import Study
from fedproxy.comparison.equal_bytes import byte_budget, equal_byte_cells, same_rounds
from fedproxy.comparison.execution import Outcome, cells, do_runs, only_one, shared_work
from fedproxy.comparison.fairness import check_fair, passes, settings_that_differ
from fedproxy.config import RunConfig
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.pipeline.checks import check_components
from fedproxy.pipeline.display import Display
from fedproxy.reporting.comparison.analysis import Analysis, analyse
from fedproxy.reporting.comparison.pages import write_comparison
from fedproxy.reporting.comparison.records import Record, require_same_questions
from fedproxy.reporting.comparison.tables import score_table
from fedproxy.reporting.comparison.view import Comparison, EqualBytes, RunLine
from fedproxy.reporting.frame import framed
from fedproxy.reporting.markdown import markdown_table

Runs = dict[str, list[Record]]


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison left; a notebook shows its page."""

    comparison: Comparison
    """The tables and what they rest on."""
    files: Sequence[Path]
    """The report: comparison.md, .html, .json and .csv."""
    failed: Sequence[str]
    """One line per run that failed."""

    def __str__(self) -> str:
        """Return the table of scores, as Markdown."""
        return markdown_table(score_table(self.comparison.analysis))

    def _repr_html_(self) -> str | None:
        return framed(next(path for path in self.files if path.suffix == ".html"))


def compare(study: Study, words: Sequence[str] = (), display: Display | None = None) -> ComparisonResult:
    """Do what a study asks and write its report.

    Args:
        study: What is compared.
        words: The command's arguments, for the report's "repeat it".
        display: Where progress is shown.

    Raises:
        FedProxyError: If recipes cannot be compared, records do not fit, or no run has a result.
    """
    display = display or Display()
    todo = cells(study)
    first = {cell.method.label: cell.config for cell in todo if cell.seed == study.seeds[0]}
    check_fair(first, budget=study.budget)
    for label, config in first.items():
        _check_components(label, config)
    _check_scored(first, study)
    _check_equal_bytes(first, study)
    with only_one(study):
        outcomes = do_runs(todo, study, display)
        runs = _records(outcomes, study)
        _check_records(outcomes)
        analysis = _analyse(study, runs)
        second, more = _equal_bytes(study, outcomes, runs, display) if study.equal_bytes else (None, [])
        outcomes = [*outcomes, *more]
        found = Comparison(
            title=study.title,
            command=shlex.join(["python", "-m", "fedproxy.compare", *words]),
            analysis=analysis,
            seeds=study.seeds,
            questions=_questions(runs, analysis),
            runs=[_line(outcome) for outcome in outcomes],
            settings=settings_that_differ(first),
            budget=study.budget,
            equal_bytes=second,
            notes=[*_run_notes(runs), *_budget_note(study, {label: passes(own) for label, own in first.items()})],
        )
        files = write_comparison(found, runs, study.output_dir)
        if not study.keep_runs and all(outcome.record for outcome in outcomes):
            shared_work(study).clear()
    failed = [f"{outcome.cell.name}: {outcome.error}" for outcome in outcomes if outcome.error]
    return ComparisonResult(found, files, failed)


def _check_components(label: str, config: RunConfig) -> None:
    """Refuse a method whose components do not go together before the first run, not hours later."""
    try:
        check_components(config)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None


def _check_scored(first: Mapping[str, RunConfig], study: Study) -> None:
    """Refuse methods without the scores that the tables are made of, before the first run."""
    for method in study.methods:
        models = first[method.label].evaluation.models
        if method.scored not in models:
            raise ConfigError(
                f"{method.label}: evaluation.models={models} lacks {method.scored}, which stands for the method in the "
                "tables; add it"
            )
    if not any("target" in config.evaluation.models for config in first.values()):
        raise ConfigError("evaluation.models: no method scores the target, from which gains are counted; add it to one")


def _check_equal_bytes(first: Mapping[str, RunConfig], study: Study) -> None:
    """Refuse to count every method's bytes against those of one that sends none for real."""
    config = first.get(study.equal_bytes or "")
    if config is not None and (_pools(config) or not config.federation.rounds):
        raise ConfigError(f"equal_bytes={study.equal_bytes}: that method sends nothing; name another, or least or most")


def _pools(config: RunConfig) -> bool:
    return config.data.partition.name == "pooled"


def _records(outcomes: Sequence[Outcome], study: Study) -> Runs:
    runs: Runs = {method.label: [] for method in study.methods}
    for outcome in outcomes:
        if outcome.record is not None:
            runs[outcome.cell.method.label].append(outcome.record)
    return runs


def _check_records(outcomes: Sequence[Outcome]) -> None:
    found = {str(outcome.cell.record): outcome.record for outcome in outcomes if outcome.record}
    if not found:
        errors = "; ".join(f"{outcome.cell.name}: {outcome.error}" for outcome in outcomes if outcome.error)
        raise CheckpointError(
            f"there is no finished run to compare{f' ({errors})' if errors else ''}; run the study first"
        )
    require_same_questions(found)


def _analyse(study: Study, runs: Runs) -> Analysis:
    scored = {method.label: method.scored for method in study.methods}
    return analyse(runs, scored=scored, ceiling=study.ceiling, reference=study.reference)


def _equal_bytes(
    study: Study, first: Sequence[Outcome], runs: Runs, display: Display
) -> tuple[EqualBytes | None, list[Outcome]]:
    assert study.equal_bytes is not None  # the caller looked
    pooled = {outcome.cell.method.label for outcome in first if _pools(outcome.cell.config)}
    budget = byte_budget(runs, study.equal_bytes, pooled=pooled)
    if budget is None:
        return None, []
    outcomes = do_runs(equal_byte_cells(study, study.methods, budget, runs), study, display)
    second: Runs = {label: list(runs[label]) if same_rounds(runs, budget, label) else [] for label in budget.rounds}
    for outcome in outcomes:
        if outcome.record is not None:
            second[outcome.cell.method.label].append(outcome.record)
    _check_records([*first, *outcomes])
    if not any(second.values()):
        return None, outcomes  # not run yet
    return EqualBytes(_analyse(study, second), budget.bytes, budget.rounds), outcomes


def _questions(runs: Mapping[str, Sequence[Record]], found: Analysis) -> int:
    record = next(record for records in runs.values() for record in records if "target" in record.answers)
    return sum(len(own.values[found.metric]) for own in record.answers["target"].values())


def _line(outcome: Outcome) -> RunLine:
    label, seed = outcome.cell.record.parent.name, outcome.cell.seed
    if outcome.record is not None:
        return RunLine(label, seed, "completed", outcome.record.report.run.seconds)
    return RunLine(label, seed, "failed" if outcome.error else "not run", None, outcome.error)


def _run_notes(runs: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return the reports' notes; one that not all have, as they have that of the target, names its methods."""
    names: dict[str, list[str]] = {}
    for label, records in runs.items():
        for note in dict.fromkeys(note for record in records for note in record.report.notes):
            names.setdefault(note, []).append(label)
    every = [label for label, records in runs.items() if records]
    return [note if names[note] == every else f"{', '.join(names[note])}: {note}" for note in names]


def _budget_note(study: Study, found: Mapping[str, float]) -> list[str]:
    counts = {label: count for label, count in found.items() if count}
    if study.budget == "equal" or len(set(counts.values())) <= 1:
        return []
    words = ", ".join(f"{label} {count:g}" for label, count in counts.items())
    return [f"Methods see every row a different number of times: {words}."]

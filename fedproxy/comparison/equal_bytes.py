"""The same methods at equal bytes: every method runs as many rounds as the chosen budget of bytes pays for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedproxy.comparison.arguments import Method, Study
from fedproxy.comparison.execution import Cell, make_cell
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.run_report import RunReport

Runs = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class ByteBudget:
    """How many rounds every method gets."""

    bytes: int
    """Upload and download of all clients and rounds that a method may spend under one seed."""
    rounds: Mapping[str, int]
    """Method to rounds; 0 where one round alone costs more."""


def byte_budget(runs: Runs, choice: str, *, exempt: str | None = None) -> ByteBudget | None:
    """Return the budget of the method that sends least, or most, and the rounds that it pays for.

    The learning rate is constant and every round starts from a checkpoint, so that a run of t rounds is the first t
    rounds of a longer one: fewer or more rounds are the same training, stopped at another time.

    Args:
        runs: Method to its records.
        choice: ``least`` or ``most``.
        exempt: The ceiling, whose pooled data send nothing for real.

    Returns:
        None if no method sends anything.
    """
    reports = {label: records[0].report for label, records in runs.items() if records and label != exempt}
    spent = {label: total_bytes(report) for label, report in reports.items() if total_bytes(report)}
    if not spent:
        return None
    budget = min(spent.values()) if choice == "least" else max(spent.values())
    return ByteBudget(budget, {label: affordable_rounds(reports[label], budget) for label in spent})


def total_bytes(report: RunReport) -> int:
    """Return upload and download of all clients and rounds."""
    return (report.cost.upload_bytes or 0) + (report.cost.download_bytes or 0)


def affordable_rounds(report: RunReport, budget: int) -> int:
    """Return the most rounds whose bytes stay within the budget; rounds beyond the last cost what the last one did."""
    costs = [(line.upload_bytes or 0) + (line.download_bytes or 0) for line in report.rounds]
    rounds, left = 0, budget
    while left >= (cost := costs[min(rounds, len(costs) - 1)]):
        rounds, left = rounds + 1, left - cost
    return rounds


def equal_byte_cells(study: Study, methods: Sequence[Method], budget: ByteBudget, runs: Runs) -> list[Cell]:
    """Return the runs that the second table needs and the first has not done."""
    return [
        make_cell(
            study, method, seed, changes=[f"federation.rounds={budget.rounds[method.label]}"], part="@equal_bytes"
        )
        for seed in study.seeds
        for method in methods
        if method.label in budget.rounds and not same_rounds(runs, budget, method.label) and budget.rounds[method.label]
    ]


def same_rounds(runs: Runs, budget: ByteBudget, label: str) -> bool:
    """Tell whether a method's own runs are already those of the second table."""
    return len(runs[label][0].report.rounds) == budget.rounds[label]

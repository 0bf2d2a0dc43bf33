"""The same methods at equal bytes: every method runs as many rounds as the chosen budget of bytes pays for."""

from collections.abc import Container, Mapping, Sequence
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


def byte_budget(runs: Runs, choice: str, *, pooled: Container[str] = ()) -> ByteBudget | None:
    """Return the budget of one method, and the rounds that it pays for.

    Where the learning rate is constant, a run of t rounds is the first t rounds of a longer one; a schedule over all
    rounds goes over the rounds that are run.

    Args:
        runs: Method to its records.
        choice: ``least`` or ``most`` for the method that sends least or most, or a method's label.
        pooled: Methods whose data lie in one hand: they send nothing for real and are left out.

    Returns:
        None if no method sends anything, or the chosen one has not run.
    """
    reports = {label: records[0].report for label, records in runs.items() if records and label not in pooled}
    spent = {label: total_bytes(report) for label, report in reports.items() if total_bytes(report)}
    if not spent or (choice not in ("least", "most") and choice not in spent):
        return None
    budget = {"least": min(spent.values()), "most": max(spent.values()), **spent}[choice]
    return ByteBudget(budget, {label: affordable_rounds(reports[label], budget) for label in spent})


def total_bytes(report: RunReport) -> int:
    """Return upload and download of all clients and rounds."""
    return (report.cost.upload_bytes or 0) + (report.cost.download_bytes or 0)


def affordable_rounds(report: RunReport, budget: int) -> int:
    """Return the most rounds whose bytes stay within the budget; rounds beyond the last cost what the last one did.

    Where a round does not say what it cost, those that were run.
    """
    costs = [(line.upload_bytes or 0) + (line.download_bytes or 0) for line in report.rounds]
    if not all(costs) or not costs:
        return len(costs)
    rounds, left = 0, budget
    while left >= (cost := costs[min(rounds, len(costs) - 1)]):
        rounds, left = rounds + 1, left - cost
    return rounds


def equal_byte_cells(study: Study, methods: Sequence[Method], budget: ByteBudget, runs: Runs) -> list[Cell]:
    """Return the runs that the second table needs and the first has not done."""
    wanted = {
        method: budget.rounds[method.label]
        for method in methods
        if budget.rounds.get(method.label) and not same_rounds(runs, budget, method.label)
    }
    # The count is part of the name: a budget that changes with a method that failed before asks for other runs.
    return [
        make_cell(study, method, seed, changes=[f"federation.rounds={rounds}"], part=f"@{rounds}_rounds")
        for seed in study.seeds
        for method, rounds in wanted.items()
    ]


def same_rounds(runs: Runs, budget: ByteBudget, label: str) -> bool:
    """Tell whether a method's own runs are already those of the second table."""
    return len(runs[label][0].report.rounds) == budget.rounds[label]

"""Two runs on the same questions: the page and the JSON that ``python -m fedproxy.report RUN_A RUN_B`` leaves."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedproxy.plain_json import write_json, write_text
from fedproxy.reporting.markdown import escape, markdown_table
from fedproxy.reporting.pairing import PairedDifference, between_runs, paired_table


@dataclass(frozen=True)
class RunComparison:
    """What the second run gains over the first."""

    first: str
    second: str
    models: Sequence[PairedDifference]
    """One row per model that both runs kept samples of, all tasks."""
    tasks: Sequence[PairedDifference]
    """One row per task, for the last of these models (``fused`` where there is one)."""


def compare_runs(first: str | Path, second: str | Path) -> RunComparison:
    """Pair two runs by question.

    Raises:
        EvaluationError: If samples are missing, or tasks, prompts, questions or versions differ; the line says which.
    """
    models, tasks = between_runs(first, second)
    return RunComparison(str(first), str(second), models, tasks)


def comparison_page(comparison: RunComparison) -> str:
    """Return the comparison as Markdown."""
    first, second = escape(comparison.first), escape(comparison.second)
    lines = [
        f"# {second} against {first}",
        "",
        f"{second} minus {first} on the same questions, in points: the mean over tasks with the 95 % interval of a "
        "paired bootstrap (stratified by task); questions lost and won; McNemar's exact p, Holm-corrected over the "
        "table's rows.",
        "",
        markdown_table(paired_table(comparison.models)),
        "",
        f"{comparison.models[-1].name} by task:",
        "",
        markdown_table(paired_table(comparison.tasks, "task")),
        "",
    ]
    return "\n".join(lines)


def save_comparison(comparison: RunComparison, folder: str | Path) -> Path:
    """Write ``paired_with_<first>.md`` and ``.json`` into ``folder`` and return the page's path.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    stem = Path(folder) / f"paired_with_{Path(comparison.first).resolve().name}"
    write_json(stem.with_name(f"{stem.name}.json"), dataclasses.asdict(comparison))
    return write_text(stem.with_name(f"{stem.name}.md"), comparison_page(comparison))

"""The page and the JSON that ``python -m fedproxy.report RUN_A RUN_B`` leaves."""

import dataclasses
import os
from pathlib import Path

from fedproxy.errors import CheckpointError
from fedproxy.files import read_json, write_json, write_text
from fedproxy.reporting.markdown import escape, markdown_table
from fedproxy.reporting.pairing import RunDifferences, between_runs, paired_hint, paired_table


def save_comparison(first: str | Path, second: str | Path) -> Path:
    """Write ``paired_with_<first>.md`` and ``.json`` into the second run's folder and return the page's path.

    Raises:
        EvaluationError: If samples are missing, or tasks, prompts, questions or versions differ; the line says which.
        CheckpointError: If the folder cannot be written.
    """
    found = between_runs(first, second)
    stem = f"paired_with_{Path(first).resolve().name}"
    page, figures = (Path(second) / f"{stem}.{ending}" for ending in ("md", "json"))
    for there in filter(os.path.lexists, (figures, page)):
        if not {"first", "second"} <= read_json(figures, dict, remedy=f"move {there} away").keys():
            raise CheckpointError(f"{there} was written by something else; move it away")
    write_json(figures, {"first": str(first), "second": str(second), **dataclasses.asdict(found)})
    return write_text(page, comparison_page(str(first), str(second), found))


def comparison_page(first: str, second: str, found: RunDifferences) -> str:
    """Return the differences of two runs as Markdown."""
    first, second = escape(first), escape(second)
    lines = [f"# {second} against {first}", ""]
    if found.models:
        lines += [
            f"{second} minus {first}, mean over tasks, and questions lost and won. {escape(paired_hint(found.models))}",
            "",
            markdown_table(paired_table(found.models)),
            "",
            f"{escape(found.models[-1].name)} by task:",
            "",
            markdown_table(paired_table(found.tasks, "task")),
            "",
        ]
    if found.alike:
        alike = escape(", ".join(found.alike))
        lines += [f"The same answers and log-likelihoods in both runs, to the last bit: {alike}.", ""]
    return "\n".join(lines)

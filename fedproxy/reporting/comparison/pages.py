"""comparison.md, .html, .json and .csv: one comparison for people and for programs."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedproxy.files import plain, write_json, write_text
from fedproxy.metric_facts import HEADLINES
from fedproxy.reporting.comparison.plots import comparison_plots
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.comparison.view import Comparison, ComparisonView, build_view
from fedproxy.reporting.html import render
from fedproxy.reporting.markdown import code_block, escape, markdown_table
from fedproxy.reporting.tables import all_shown, shown
from fedproxy.reporting.view import presentable

SCHEMA_VERSION = 1
_OF_ANSWERS = tuple(name for name in HEADLINES if name not in ("acc", "acc_norm", "answer_nll"))
_CSV_METRICS = (
    *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "answer_nll"),
    *(column for name in _OF_ANSWERS for column in (name, f"{name}_stderr")),
    "n",
)
_CSV_COSTS = ("upload_bytes", "download_bytes", "trainable_parameters", "client_seconds")
_FORMULA = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}", "\N{FULLWIDTH COMMERCIAL AT}")
Runs = Mapping[str, Sequence[Record]]


def write_comparison(found: Comparison, runs: Runs, folder: str | Path) -> list[Path]:
    """Write the four files and return their paths.

    Args:
        found: What the comparison says.
        runs: Method to its records, for plots and the table of single scores.
        folder: Where the files go.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    folder, view = Path(folder), build_view(found)
    runs = {label: [replace(own, report=presentable(own.report)) for own in records] for label, records in runs.items()}
    content = {"schema_version": SCHEMA_VERSION, **all_shown(plain(dataclasses.asdict(found))), "command": view.command}
    page = render("comparison.html.j2", view=view, plots=comparison_plots(found.analysis, runs))
    return [
        write_text(folder / "comparison.md", to_markdown(view)),
        write_text(folder / "comparison.html", page),
        write_json(folder / "comparison.json", content),
        write_text(folder / "comparison.csv", to_csv(runs)),
    ]


def to_markdown(view: ComparisonView) -> str:
    """Return the comparison as text that also reads well unrendered."""
    facts = " · ".join(f"{escape(name)}: {escape(value)}" for name, value in view.facts)
    lines = [f"# {escape(view.title)}", "", facts, ""]
    lines += [text for note in view.notes for text in (f"> **Note.** {escape(note)}", "")]
    lines += [f"- {escape(line)}" for line in view.findings]
    for section in view.sections:
        lines += ["", f"## {escape(section.title)}", "", markdown_table(section.table)]
        lines += [text for hint in section.hints for text in ("", escape(hint))]
    lines += ["", "## Repeat it", "", code_block([view.command]), ""]
    return "\n".join(lines)


def to_csv(runs: Runs) -> str:
    """Return one line per method, seed, model and task (``mean`` included), costs of the run at the end."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "recipe", "seed", "model", "task", *_CSV_METRICS, "examples", *_CSV_COSTS])
    for label, records in runs.items():
        for record in records:
            report = record.report
            costs = [record.examples, *(getattr(report.cost, name) for name in _CSV_COSTS)]
            for model, tasks in report.scores.items():
                for task, metrics in tasks.items():
                    values = [metrics.get(metric) for metric in _CSV_METRICS]
                    names = [_cell(name) for name in (label, report.run.recipe, record.seed, model, task)]
                    table.writerow([*names, *values, *costs])
    return text.getvalue()


def _cell(value: str | int) -> str | int:
    """Return a text that no spreadsheet takes for a formula: one that begins like one gets a quote in front."""
    if not isinstance(value, str):
        return value
    text = shown(value)
    return f"'{text}" if text.startswith(_FORMULA) else text

"""Writes the pages that people read next to report.json."""

from dataclasses import replace
from pathlib import Path

from fedproxy.errors import EvaluationError
from fedproxy.files import write_json, write_text
from fedproxy.reporting.html import to_html
from fedproxy.reporting.markdown import to_markdown
from fedproxy.reporting.pairing import PairedDifference, against_target, evaluations_of, on_sources
from fedproxy.reporting.run_report import PAGES, RunReport


def save_report(report: RunReport, folder: str | Path) -> Path:
    """Write report.json, then report.md and report.html, each whole or not at all, and return report.json's path.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    path = write_json(Path(folder) / "report.json", report.to_dict())
    write_pages(report, folder)
    return path


def write_pages(report: RunReport, folder: str | Path) -> list[Path]:
    """Write report.md and report.html into ``folder`` and return their paths.

    Samples kept in ``folder/evaluation`` add the paired differences to the target. Samples that cannot be used do not
    stop the report: a note says why they were left out.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    paired: list[PairedDifference] = []
    by_source: list[PairedDifference] = []
    try:
        evaluations = evaluations_of(folder)
        by_source = on_sources(evaluations)
        paired = against_target(evaluations)
    except EvaluationError as error:
        report = replace(report, notes=(*report.notes, f"Paired differences are left out: {error}"))
    made = (to_markdown(report, folder, paired, by_source), to_html(report, folder, paired, by_source))
    return [write_text(Path(folder) / name, text) for name, text in zip(PAGES, made, strict=True)]

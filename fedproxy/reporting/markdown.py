"""report.md: the run as plain text that also reads well unrendered."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedproxy.reporting.formatting import MINUS, NONE
from fedproxy.reporting.tables import LONGEST_COMMAND, Table, shown
from fedproxy.reporting.view import build_view

if TYPE_CHECKING:
    from fedproxy.reporting.pairing import PairedDifference
    from fedproxy.reporting.run_report import RunReport


def to_markdown(
    report: "RunReport",
    folder: str | Path,
    paired: "Sequence[PairedDifference]" = (),
    by_source: "Sequence[PairedDifference]" = (),
) -> str:
    """Return report.md for a report that lies in ``folder``.

    Args:
        report: The run.
        folder: Where the page will lie; its commands name it.
        paired: Differences to the target on the same questions, where samples were kept.
        by_source: The fused model's, source by source.
    """
    return _environment().get_template("report.md.j2").render(view=build_view(report, folder, paired, by_source))


def markdown_table(table: Table) -> str:
    """Return a pipe table with aligned columns: text to the left, everything but the first column to the right."""
    rows = [[escape(cell) for cell in row] for row in table.rows]
    if table.strong_last and rows:
        rows[-1] = [f"**{cell}**" if cell else cell for cell in rows[-1]]
    head = [escape(cell) for cell in table.head]
    widths = [max(3, *(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
    right = [column > 0 and _numeric([row[column] for row in table.rows]) for column in range(len(head))]
    ruler = ["-" * (width - 1) + ":" if aligned else "-" * width for width, aligned in zip(widths, right, strict=True)]
    return "\n".join(f"| {' | '.join(_padded(row, widths, right))} |" for row in [head, ruler, *rows])


def escape(text: str) -> str:
    """Return ``text`` for one line of Markdown, shown as it is.

    It holds no line break and no table bar, and nothing in it becomes a heading, HTML, an image, a link, a mention or
    a formula, written out or found by a renderer that looks for addresses.
    """
    line = shown(text)
    line = re.sub(r"[\\`*|\[\]@$]", r"\\\g<0>", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    line = re.sub(r":(?=//)", r"\\:", line)
    line = re.sub(r"\b(www)\.", r"\1\\.", line, flags=re.IGNORECASE)
    return re.sub(r"^(?=[#>~])", r"\\", line)


def code_block(lines: Iterable[str]) -> str:
    """Return lines of a shell as a block of code; none of them can end it."""
    lines = [shown(line, LONGEST_COMMAND) for line in lines]
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}sh", *lines, fence])


def _padded(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [
        cell.rjust(width) if aligned else cell.ljust(width)
        for cell, width, aligned in zip(row, widths, right, strict=True)
    ]


def _numeric(cells: Sequence[str]) -> bool:
    return all(not cell or cell[0].isdigit() or cell[0] in f"+-<{MINUS}{NONE}" for cell in cells)


@cache
def _environment() -> Environment:
    # Markdown is no HTML: autoescape would turn quotes into entities, so every value goes through `escape` instead.
    environment = Environment(
        loader=PackageLoader("fedproxy.reporting"), autoescape=False, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: value,
    )  # fmt: skip
    environment.filters.update(line=escape, table=markdown_table, code=code_block)
    return environment

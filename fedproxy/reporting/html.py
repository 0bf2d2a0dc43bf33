"""report.html: one self-contained page, without script, that reads on a phone, in the dark and on paper."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fedproxy.reporting.formatting import MINUS
from fedproxy.reporting.plots import draw_plots
from fedproxy.reporting.view import build_view, presentable

if TYPE_CHECKING:
    from fedproxy.reporting.pairing import PairedDifference
    from fedproxy.reporting.run_report import RunReport


def to_html(
    report: "RunReport",
    folder: str | Path,
    paired: "Sequence[PairedDifference]" = (),
    by_source: "Sequence[PairedDifference]" = (),
) -> str:
    """Return report.html for a report that lies in ``folder``.

    Args:
        report: The run.
        folder: Where the page will lie; its commands name it.
        paired: Differences to the target on the same questions, where samples were kept.
        by_source: The fused model's, source by source.
    """
    plain = presentable(report)
    plots = draw_plots(plain)
    return render("report.html.j2", view=build_view(plain, folder, paired, by_source), plots=plots)


def render(template: str, **content: Any) -> str:
    """Return a page of ``templates/``; values are escaped, plots are not."""
    return _environment().get_template(template).render(**content)


def cell(text: str) -> Markup:
    """Return a table cell's content; a change in brackets at its end is set apart and coloured by its sign."""
    match = re.fullmatch(rf"(.+) \(([+{MINUS}]?)([\d.]+)\)", text)
    if not match:
        return escape(text)
    kind = {"+": "up", MINUS: "down"}.get(match[2], "same")
    return Markup('<span>{}</span> <span class="change {}">{}{}</span>').format(match[1], kind, match[2], match[3])


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedproxy.reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(cell=cell, safe_svg=Markup)  # Matplotlib escapes text, `plots` the rest
    return environment

"""Inline SVG for the report's page: text stays text, colours come from its style sheet, each plot has a description."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 4.4
"""Inches: narrow enough that text stays legible when a phone scales the plot down."""
INK, FAINT = "#0a0b0c", "#0a0b0d"
"""Stand-ins for the page's text and line colours; so are the series' colours below."""
SERIES = tuple(f"#0a0c{index:02x}" for index in range(8))
_STYLE_NAMES = {INK: "currentColor", FAINT: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}


@dataclass(frozen=True)
class Plot:
    """A finished plot."""

    title: str
    svg: str
    description: str
    """What the plot shows, in words and numbers, for those who do not see it."""


def plot(title: str, description: str, draw: Callable[["Axes"], None], height: float = 2.9) -> Plot:
    """Return the plot that ``draw`` makes on fresh axes; no window system and none of pyplot's state is involved."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT, "grid.color": FAINT, "grid.linewidth": 0.6,
        "text.parse_math": False,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    buffer = io.StringIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's fonts draw it, not Matplotlib's
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(title, _inline(buffer.getvalue(), title, description), description)


def _inline(svg: str, title: str, description: str) -> str:
    """Return Matplotlib's SVG for use inside a page: themed, scalable, with a title and a description."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, name in _STYLE_NAMES.items():
        svg = svg.replace(color, name)
    name = re.sub(r"\W+", "-", title.lower())
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", head)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body)  # the page holds several plots
    words = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    return f'{head} role="img" aria-labelledby="{name}-t {name}-d">{words}{body}'

"""Plots of a run as inline SVG: text stays text, colours come from the page's style sheet, each has a description."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from fedproxy.reporting import formatting as show
from fedproxy.reporting.round_tables import mean_of
from fedproxy.reporting.run_report import RoundReport, RunReport
from fedproxy.reporting.scores import MODELS, headline_metric, task_metric, task_names, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 4.4
"""Inches: narrow enough that text stays legible when a phone scales the plot down."""
INK, FAINT = "#0a0b0c", "#0a0b0d"
"""Stand-ins for the page's text and line colours; so are the series' colours below."""
SERIES = tuple(f"#0a0c{index:02x}" for index in range(8))
_STYLE_NAMES = {INK: "currentColor", FAINT: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}
_CELL_TEXT_LIMIT = 12
"""Clients up to which a heat map writes its numbers into the cells."""


@dataclass(frozen=True)
class Plot:
    """A finished plot."""

    title: str
    svg: str
    description: str
    """What the plot shows, in words and numbers, for those who do not see it."""


def draw_plots(report: RunReport) -> list[Plot]:
    """Return every plot that the report has data for; ``report`` must be plain (from :meth:`RunReport.from_dict`)."""
    plots = (_accuracy(report), _loss(report.rounds), _conflict(report.rounds), _cosine(report.rounds), _blocks(report))
    return [plot for plot in plots if plot is not None]


def _accuracy(report: RunReport) -> Plot | None:
    models = [model for model in MODELS if model in report.scores]
    mean = headline_metric(report.scores)
    metrics = {task: task_metric(report.scores, task) for task in task_names(report.scores)}
    rows = [(task, metric) for task, metric in metrics.items() if metric]
    rows += [("mean", mean)] if mean and len(rows) > 1 else []
    if not rows:
        return None

    def draw(axes: "Axes") -> None:
        thick = 0.8 / len(models)
        for number, model in enumerate(models):
            for row, (task, metric) in enumerate(rows):
                value = value_of(report.scores[model].get(task), metric)
                if value is None:
                    continue
                place, length = row + (number - (len(models) - 1) / 2) * thick, 100 * value.value
                axes.barh(place, length, thick * 0.88, color=SERIES[number], label=model if row == 0 else None)
                error = 100 * (value.stderr or 0.0)
                if error:
                    axes.plot([length - error, length + error], [place, place], color=INK, linewidth=1)
                axes.text(length + error + 1, place, f"{length:.1f}", va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(rows)), [task for task, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel("per cent, line = ± 1 standard error")
        _legend(axes, len(models))

    words = "; ".join(
        f"{task}: " + ", ".join(f"{m} {show.score(value_of(report.scores[m].get(task), metric))}" for m in models)
        for task, metric in rows
    )
    return _plot(
        "Scores per task", f"Bars, in per cent. {words}.", draw, height=0.9 + 0.19 * len(rows) * (len(models) + 1)
    )


def _loss(rounds: Sequence[RoundReport]) -> Plot | None:
    known = [(line.round, mean_of(line.train_loss)) for line in rounds]
    if all(loss is None for _, loss in known):
        return None
    clients = sorted({client for line in rounds for client in line.clients})

    def draw(axes: "Axes") -> None:
        curves = {client: _of_client(rounds, client) for client in clients}
        curves = {client: curve for client, curve in curves.items() if any(y is not None for _, y in curve)}
        if len(curves) < len(SERIES):
            for number, (client, curve) in enumerate(curves.items(), start=1):
                _line(axes, curve, SERIES[number], client, width=1.1)
        _line(axes, known, INK, "mean", width=2.2)
        _round_axis(axes, rounds, "loss, nats per answer token")
        _legend(axes, 3)

    return _plot("Training loss per round", f"Mean over clients. {_by_round(known)}.", draw)


def _of_client(rounds: Sequence[RoundReport], client: str) -> list[tuple[int, float | None]]:
    curve: list[tuple[int, float | None]] = []
    for line in rounds:
        losses = line.train_loss
        if isinstance(losses, Sequence) and len(losses) == len(line.clients) and client in line.clients:
            curve.append((line.round, losses[list(line.clients).index(client)]))
    return curve


def _conflict(rounds: Sequence[RoundReport]) -> Plot | None:
    conflict = [(line.round, line.conflict_mean) for line in rounds]
    spread = [(line.round, mean_of(line.heterogeneity)) for line in rounds]
    if all(value is None for _, value in conflict):
        return None
    both = any(value is not None for _, value in spread)

    def draw(axes: "Axes") -> None:
        _line(axes, conflict, SERIES[3], "conflict C", width=2.2)
        if both:
            _line(axes, spread, SERIES[2], "heterogeneity h", width=1.5)
        _round_axis(axes, rounds, "mean, 0 to 1")
        axes.set_ylim(0, 1)
        _legend(axes, 2)

    words = f"Mean conflict. {_by_round(conflict)}." + (f" Mean heterogeneity. {_by_round(spread)}." if both else "")
    return _plot("Conflict between clients per round", words, draw)


def _cosine(rounds: Sequence[RoundReport]) -> Plot | None:
    lines = [line for line in rounds if line.cosine is not None and len(line.clients) > 1]
    if not lines:
        return None
    clients, matrix = lines[-1].clients, lines[-1].cosine or ()

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                red, green, blue, _ = colormaps["RdBu"](
                    0.5 if value is None else 0.5 + 0.42 * max(-1.0, min(1.0, value))
                )
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 0.97, 0.97, facecolor=(red, green, blue), linewidth=0))
                if len(clients) <= _CELL_TEXT_LIMIT:
                    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                    axes.text(
                        j, i, show.NONE if value is None else f"{value:.2f}", ha="center", va="center", fontsize=8,
                        color="#ffffff" if dark else "#16181d",
                    )  # fmt: skip
        side = range(len(clients))
        axes.set(xlim=(-0.5, len(clients) - 0.5), ylim=(len(clients) - 0.5, -0.5))
        axes.set_xticks(side, clients, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(side, clients)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    pairs = [
        f"{clients[i]} and {clients[j]} {show.fixed(matrix[i][j], 2)}"
        for i in range(len(clients))
        for j in range(i + 1, len(clients))
    ]
    title = f"Cosine of client updates, round {lines[-1].round}"
    return _plot(title, f"Heat map, 1 same and -1 opposite direction. {'; '.join(pairs)}.", draw, height=3.3)


def _blocks(report: RunReport) -> Plot | None:
    found = report.compression
    if found is None or not found.scores:
        return None
    removed = sorted(set(range(len(found.scores))) - set(found.kept))

    def draw(axes: "Axes") -> None:
        for blocks, color, label in ((sorted(set(found.kept)), SERIES[2], "kept"), (removed, SERIES[3], "removed")):
            heights = [found.scores[block] or 0.0 for block in blocks]
            bars = axes.bar(blocks, heights, color=color if label == "kept" else "none", edgecolor=color, label=label)
            if label == "removed":
                for bar in bars:
                    bar.set_linestyle((0, (2, 1.2)))
        axes.set_xlabel("block of the target")
        axes.set_ylabel("Block Influence")
        axes.set_xlim(-0.7, len(found.scores) - 0.3)
        _legend(axes, 2)

    values = ", ".join(f"{index} {show.number(value)}" for index, value in enumerate(found.scores))
    gone = ", ".join(map(str, removed)) or "none"
    return _plot("Block Influence", f"Bars per block of the target. Removed: {gone}. Values: {values}.", draw)


def _line(axes: "Axes", curve: Sequence[tuple[int, float | None]], color: str, label: str, width: float) -> None:
    points = [(x, y) for x, y in curve if y is not None]
    axes.plot(
        [x for x, _ in points], [y for _, y in points], "o-", color=color, label=label, linewidth=width, markersize=3.5
    )


def _round_axis(axes: "Axes", rounds: Sequence[RoundReport], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(rounds) == 1:
        axes.set_xlim(rounds[0].round - 1, rounds[0].round + 1)
    axes.set_xlabel("round")
    axes.set_ylabel(label)


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False, fontsize=8, labelcolor=INK,
        borderaxespad=0.2, borderpad=0, handlelength=1.2, columnspacing=1.0, handletextpad=0.5,
    )  # fmt: skip


def _by_round(curve: Sequence[tuple[int, float | None]]) -> str:
    return ", ".join(f"round {number}: {show.fixed(value)}" for number, value in curve)


def _plot(title: str, description: str, draw: Callable[["Axes"], None], height: float = 2.9) -> Plot:
    """Draw on fresh axes and return the plot; nothing global is touched, so any thread may call this."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT, "grid.color": FAINT, "grid.linewidth": 0.6,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    buffer = io.StringIO()
    with mpl.rc_context(style):
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

"""The comparison's plots: accuracy against bytes, loss per round, conflict and cosines, Block Influence."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedproxy.metric_facts import facts
from fedproxy.reporting import formatting as show
from fedproxy.reporting.comparison.analysis import Analysis
from fedproxy.reporting.comparison.records import Record
from fedproxy.reporting.comparison.tables import sent
from fedproxy.reporting.plots import block_plot, cosine_plot, heat_map
from fedproxy.reporting.round_tables import mean_of, validated
from fedproxy.reporting.run_report import RoundReport
from fedproxy.reporting.scores import ACCURACIES
from fedproxy.reporting.svg import FAINT, INK, SERIES, Plot, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 2**20
_DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))
_MARKERS = ("o", "s", "^")
_LABELLED_POINTS = 8
"""Points that carry their names; more would cover each other, and a legend names them."""
_NAME_WIDTH = 0.6
"""Width of a long name, in parts of what the points span in x."""
Runs = Mapping[str, Sequence[Record]]
Curve = Sequence[tuple[int, float | None]]


def comparison_plots(found: Analysis, runs: Runs) -> list[Plot]:
    """Return every plot that the runs have data for; rounds are those of each method's first seed."""
    rounds = {label: records[0].report.rounds for label, records in runs.items() if records}
    drawn = [_accuracy_against_bytes(found), _losses(rounds), _validation(runs, rounds), _conflict(rounds)]
    shown = (found.reference, _first(rounds))
    drawn += [cosine_plot(lines, f"{label}, ") for label, lines in rounds.items() if label in shown]
    return [one for one in [*drawn, _block_influence(runs)] if one is not None]


def _first(rounds: Mapping[str, Sequence[RoundReport]]) -> str | None:
    """Return the first method whose rounds know cosines."""
    return next((label for label, lines in rounds.items() if any(line.cosine is not None for line in lines)), None)


def _accuracy_against_bytes(found: Analysis) -> Plot | None:
    share = facts(found.metric).share
    scale = 100 if share else 1
    points = [
        (row.label, (sent(row) or 0) / _MIB, scale * row.scores["mean"].value, row.scores["mean"].stderr_questions)
        for row in found.methods
        if sent(row) and row.label != found.ceiling
    ]
    if not points:
        return None
    crowded = len(points) > _LABELLED_POINTS
    lines = [("zero-shot", scale * found.zero_shot["mean"].value)]
    lines += [(row.label, scale * row.scores["mean"].value) for row in found.methods if row.label == found.ceiling]

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        for label, height in lines:
            axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (4, 2)))
            beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(label, (1, height), (4, 0), **beside, va="center", fontsize=8, color=INK)
        colors = SERIES[1:]
        for number, (label, x, y, error) in enumerate(points):
            style: dict[str, Any] = {
                "color": colors[number % len(colors)],
                "marker": _MARKERS[number // len(colors) % len(_MARKERS)],
            }
            bars = [scale * (error or 0.0)]
            axes.errorbar([x], [y], yerr=bars, linestyle="", ecolor=FAINT, markersize=5, label=label, **style)
        if crowded:
            _legend(axes)
        else:
            low, high = axes.get_ylim()
            heights = _apart([(math.log10(x), y) for _, x, y, _ in points], (high - low) * 0.055)
            for (label, x, _, _), height in zip(points, heights, strict=True):
                axes.annotate(
                    label, (x, height), (6, 0), textcoords="offset points", va="center", fontsize=8, color=INK
                )
        axes.set_xscale("log")
        wide = max(x for _, x, _, _ in points) > 30 * min(x for _, x, _, _ in points)
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1 if crowded else 0.35)
        axes.set_xlabel("sent by all clients and rounds, both ways, MiB (log scale)")
        axes.set_ylabel("mean accuracy, per cent" if share else f"mean {found.metric}")

    number = "{:.1f} %" if share else "{:.3f}"
    words = "; ".join(f"{label} {x:.1f} MiB, {number.format(y)}" for label, x, y, _ in points)
    levels = "; ".join(f"{label} {number.format(height)}" for label, height in lines)
    height = 3.6 + (0.16 * (len(points) // 3) if crowded else 0.0)
    title = "Accuracy against bytes" if share else f"{found.metric} against bytes"
    return plot(
        title,
        f"Points. {words}. Levels: {levels}.",
        draw,
        height=height,
    )


def _legend(axes: "Axes") -> None:
    """Put a legend of three columns above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=7, labelcolor=INK,
        borderaxespad=0.2, borderpad=0, handlelength=1.6, columnspacing=1.0, handletextpad=0.5,
    )  # fmt: skip


def _apart(points: Sequence[tuple[float, float]], least: float) -> list[float]:
    """Return label heights in the same order, ``least`` apart where points are too near in x for two names."""
    across = [x for x, _ in points]
    near = _NAME_WIDTH * (max(across) - min(across))
    placed: dict[int, float] = {}
    for one in sorted(range(len(points)), key=lambda number: points[number][1]):
        beside = [height for other, height in placed.items() if abs(across[other] - across[one]) <= near]
        placed[one] = max([points[one][1], *(height + least for height in beside)])
    return [placed[number] for number in range(len(points))]


def _losses(rounds: Mapping[str, Sequence[RoundReport]]) -> Plot | None:
    curves = {label: [(line.round, mean_of(line.train_loss)) for line in lines] for label, lines in rounds.items()}
    return _curves("Training loss per round", "loss, nats per answer token", curves)


def _validation(runs: Runs, rounds: Mapping[str, Sequence[RoundReport]]) -> Plot | None:
    """Return mean accuracy per round on validation rows, where the recipes ask for it."""
    asked = (record.report.validation for records in runs.values() for record in records)
    models = " or ".join(sorted({"tuned proxy" if own.model == "proxy" else "fused model" for own in asked if own}))
    for metric in ACCURACIES:
        curves = {label: [(line.round, validated(line, metric)) for line in lines] for label, lines in rounds.items()}
        drawn = _curves(f"Validation accuracy per round, {models}", f"mean {metric}, 0 to 1", curves)
        if drawn is not None:
            return drawn
    return None


def _curves(title: str, unit: str, curves: Mapping[str, Curve]) -> Plot | None:
    curves = {label: curve for label, curve in curves.items() if any(value is not None for _, value in curve)}
    if not curves:
        return None

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for number, (label, curve) in enumerate(curves.items()):
            style = _DASHES[number // len(SERIES) % len(_DASHES)]
            known = [(x, y) for x, y in curve if y is not None]
            xs, ys = [x for x, _ in known], [y for _, y in known]
            axes.plot(
                xs, ys, color=SERIES[number % len(SERIES)], linestyle=style, marker="o", markersize=3, label=label
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("round")
        axes.set_ylabel(unit)
        _legend(axes)

    words = "; ".join(f"{label}: {_values(curve)}" for label, curve in curves.items())
    return plot(title, f"Lines. {words}.", draw, height=2.9 + 0.16 * (len(curves) // 3))


def _values(curve: Curve) -> str:
    return ", ".join(f"round {number} {show.fixed(value)}" for number, value in curve)


def _conflict(rounds: Mapping[str, Sequence[RoundReport]]) -> Plot | None:
    known = {
        label: {line.round: line.conflict_mean for line in lines if line.conflict_mean is not None}
        for label, lines in rounds.items()
    }
    known = {label: values for label, values in known.items() if values}
    if not known:
        return None
    columns = sorted({number for values in known.values() for number in values})
    matrix = [[values.get(number) for number in columns] for values in known.values()]
    words = "; ".join(f"{label}: {_values(list(values.items()))}" for label, values in known.items())

    def draw(axes: "Axes") -> None:
        heat_map(axes, matrix, "Oranges", low=0.0, aspect="auto")
        names = [str(number) for number in columns]
        turn: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(names[-1]) > 3 else {}
        axes.set_xticks(range(len(names)), names, fontsize=8, **turn)
        axes.set_yticks(range(len(known)), list(known), fontsize=8)
        axes.set_xlabel("round; 0 all agree, 1 full conflict")

    return plot(
        "Conflict between clients, by method", f"Heat map, 0 to 1. {words}.", draw, height=1.1 + 0.3 * len(known)
    )


def _block_influence(runs: Runs) -> Plot | None:
    """Return the plot of the first run that measured it: all runs measure the same target."""
    reports = (record.report for records in runs.values() for record in records)
    report = next((report for report in reports if report.compression and report.compression.scores), None)
    return block_plot(report) if report else None

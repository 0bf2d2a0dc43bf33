"""The plots of a run: scores, training loss, conflict, cosines of the updates and Block Influence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fedproxy.metric_facts import facts
from fedproxy.reporting import formatting as show
from fedproxy.reporting.round_tables import by_client, mean_of
from fedproxy.reporting.run_report import RoundReport, RunReport
from fedproxy.reporting.scores import ACCURACIES, MODELS, Value, headline_metric, task_metric, task_names, value_of
from fedproxy.reporting.svg import INK, SERIES, Plot, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERED_CELLS, _NAMED_CLIENTS = 12, 40
"""Clients up to which a heat map writes numbers into its cells, and names along its sides."""


def draw_plots(report: RunReport) -> list[Plot]:
    """Return every plot that the report has data for; ``report`` must be plain (from :meth:`RunReport.from_dict`)."""
    rounds = report.rounds
    found = (
        _accuracy(report), _likelihood(report), _loss(rounds), _validation(rounds, "answer_nll"),
        next(filter(None, (_validation(rounds, metric) for metric in ACCURACIES)), None),
        _conflict(rounds), cosine_plot(rounds), block_plot(report),
    )  # fmt: skip
    return [drawn for drawn in found if drawn is not None]


def _accuracy(report: RunReport) -> Plot | None:
    mean = headline_metric(report.scores)
    metrics = {task: task_metric(report.scores, task) for task in task_names(report.scores)}
    rows = [(task, metric) for task, metric in metrics.items() if metric and facts(metric).share]
    rows += [("mean", mean)] if mean and facts(mean).share and len(rows) > 1 else []
    return _bars(report, "Scores per task", rows, ("Bars, in per cent.", "per cent", 100))


def _likelihood(report: RunReport) -> Plot | None:
    """Return answer NLL per source, for sources that have no accuracy."""
    sources = [task for task in task_names(report.scores) if task_metric(report.scores, task) == "answer_nll"]
    rows = [(task, "answer_nll") for task in sources]
    return _bars(report, "Answer NLL per source", rows, ("Bars.", "answer NLL, nats per token", 1))


def _bars(report: RunReport, title: str, rows: Sequence[tuple[str, str]], words: tuple[str, str, float]) -> Plot | None:
    """Return a bar per task and model, with its standard error; None without rows.

    Args:
        report: Whose scores are drawn.
        title: Of the plot.
        rows: Task and the metric that it is shown by.
        words: What the description begins with, what the axis counts, and what a value is multiplied by.
    """
    if not rows:
        return None
    models = [model for model in MODELS if model in report.scores]
    found = {(m, task): value_of(report.scores[m].get(task), metric) for m in models for task, metric in rows}
    begin, unit, scale = words

    def draw(axes: "Axes") -> None:
        thick = 0.8 / len(models)
        for number, model in enumerate(models):
            label: str | None = model
            for row, (task, metric) in enumerate(rows):
                value = found[model, task]
                if value is None:
                    continue
                place, length = row + (number - (len(models) - 1) / 2) * thick, scale * value.value
                axes.barh(place, length, thick * 0.88, color=SERIES[number], label=label)
                label = None  # once in the legend, by the first task that the model has
                error = scale * (value.stderr or 0.0)
                if error:
                    axes.plot([length - error, length + error], [place, place], color=INK, linewidth=1)
                axes.annotate(
                    show.measured(metric, Value(value.value)), (length + error, place), (4, 0),
                    textcoords="offset points", va="center", fontsize=8, color=INK,
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [task for task, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.12)
        if scale == 100:
            axes.set_xlim(0, max(5.0, axes.get_xlim()[1]))  # where all scores are 0, their texts need room
        axes.set_xlabel(f"{unit}, line = ± 1 standard error")
        _legend(axes, len(models))

    said = "; ".join(
        f"{task}: " + ", ".join(f"{model} {show.measured(metric, found[model, task])}" for model in models)
        for task, metric in rows
    )
    return plot(title, f"{begin} {said}.", draw, height=0.9 + 0.19 * len(rows) * (len(models) + 1))


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
                _line(axes, curve, SERIES[number], _short(client), width=1.1)
        _line(axes, known, INK, "mean", width=2.2)
        _round_axis(axes, rounds, "loss, nats per answer token")
        _legend(axes, 3)

    return plot("Training loss per round", f"Mean over clients. {_by_round(known)}.", draw)


_VALIDATION = {
    "answer_nll": ("Validation loss per round", "answer NLL, nats per token", 1.0),
    "acc": ("Validation accuracy per round", "acc, per cent", 100.0),
    "acc_norm": ("Validation accuracy per round", "acc_norm, per cent", 100.0),
}
"""By metric: title, label of the axis, and what a value is multiplied by."""


def _validation(rounds: Sequence[RoundReport], metric: str) -> Plot | None:
    scored = [line for line in rounds if line.validation]
    title, label, scale = _VALIDATION[metric]
    sources = [name for name in (scored[0].validation or {} if scored else {}) if name != "mean"]

    def curve(source: str) -> list[tuple[int, float | None]]:
        values = [(line.round, (line.validation or {}).get(source, {}).get(metric)) for line in scored]
        return [(number, None if value is None else scale * value) for number, value in values]

    mean = curve("mean")
    if all(value is None for _, value in mean):
        return None

    def draw(axes: "Axes") -> None:
        if 1 < len(sources) < len(SERIES):
            for number, source in enumerate(sources, start=1):
                _line(axes, curve(source), SERIES[number], _short(source), width=1.1)
        _line(axes, mean, INK, "mean", width=2.2)
        _round_axis(axes, scored, label)
        _legend(axes, 3)

    return plot(title, f"Mean over tasks of held-out rows that no client owns, {label}. {_by_round(mean)}.", draw)


def _of_client(rounds: Sequence[RoundReport], client: str) -> list[tuple[int, float | None]]:
    curve: list[tuple[int, float | None]] = []
    for line in rounds:
        losses = by_client(line, line.train_loss)
        if client in losses:
            curve.append((line.round, losses[client]))
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
    return plot("Conflict between clients per round", words, draw)


def cosine_plot(rounds: Sequence[RoundReport], of: str = "") -> Plot | None:
    """Return the cosines of the last round that knows them; None without. ``of`` names the run in the title."""
    lines = [line for line in rounds if line.cosine is not None and len(line.clients) > 1]
    if not lines:
        return None
    matrix, names = lines[-1].cosine or (), [_short(client) for client in lines[-1].clients]
    few = len(names) <= _NUMBERED_CELLS

    def draw(axes: "Axes") -> None:
        heat_map(axes, matrix, "RdBu", low=-1.0, aspect="equal")
        turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90, "fontsize": 7}
        if len(names) <= _NAMED_CLIENTS:
            axes.set_xticks(range(len(names)), names, **turn)
            axes.set_yticks(range(len(names)), names, fontsize=9 if few else 7)
        axes.set_xlabel("blue: same direction, red: opposite")

    title = f"Cosine of client updates, {of}round {lines[-1].round}"
    return plot(title, f"Heat map, 1 same and -1 opposite direction. {_cosine_words(lines[-1])}.", draw, height=3.7)


def heat_map(
    axes: "Axes", matrix: Sequence[Sequence[float | None]], colors: str, *, low: float, aspect: Literal["equal", "auto"]
) -> None:
    """Draw numbers from ``low`` to 1 as coloured cells, numbered where they are few; None has no colour."""
    from matplotlib import colormaps

    def paint(value: float | None) -> tuple[float, float, float, float]:
        if value is None:
            return (1.0, 1.0, 1.0, 0.0)
        share = (max(low, min(1.0, value)) - low) / (1.0 - low)
        found: tuple[float, float, float, float] = colormaps[colors](0.08 + 0.84 * share)
        return found

    painted = [[paint(value) for value in row] for row in matrix]
    axes.imshow(painted, interpolation="nearest", aspect=aspect)
    for i, row in enumerate(matrix if max(len(matrix), len(matrix[0])) <= _NUMBERED_CELLS else ()):
        for j, value in enumerate(row):
            red, green, blue, _ = painted[i][j]
            ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#16181d"
            color = INK if value is None else ink
            axes.text(j, i, show.fixed(value, 2), ha="center", va="center", fontsize=8, color=color)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cosine_words(line: RoundReport) -> str:
    """Return the cosine of every pair of clients, or of the closest and farthest pair where they are many."""
    pairs = [
        (value, f"{line.clients[i]} and {line.clients[j]} {show.fixed(value, 2)}")
        for i, row in enumerate(line.cosine or ())
        for j, value in enumerate(row)
        if j > i
    ]
    if len(line.clients) <= _NUMBERED_CELLS:
        return "; ".join(text for _, text in pairs)
    known = sorted((value, text) for value, text in pairs if value is not None)
    return f"{len(pairs)} pairs; lowest {known[0][1]}; highest {known[-1][1]}" if known else "no values"


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def block_plot(report: RunReport) -> Plot | None:
    """Return Block Influence per block of the target; None where it was not measured."""
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
    return plot("Block Influence", f"Bars per block of the target. Removed: {gone}. Values: {values}.", draw)


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

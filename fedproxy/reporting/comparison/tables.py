"""The comparison's tables: finished text, one row per method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedproxy.metric_facts import facts
from fedproxy.reporting import formatting as show
from fedproxy.reporting.comparison.analysis import FUSED, Analysis, Difference, MethodResult
from fedproxy.reporting.comparison.answers import Score
from fedproxy.reporting.pairing import NLL_DIFFERENCE
from fedproxy.reporting.scores import Value
from fedproxy.reporting.statistics import Interval
from fedproxy.reporting.tables import Table


def score_table(found: Analysis) -> Table:
    """Return mean accuracy, what it costs, and accuracy per task; in this order, as a page cuts off what is wide."""
    tasks = [task for task in found.zero_shot if task != "mean"]
    metric = found.metric
    with_nll = metric != "answer_nll" and any(row.answer_nll is not None for row in found.methods)
    seeds = any(score.stderr_seeds is not None for row in found.methods for score in row.scores.values())
    head = ["method", "mean", *(["± seeds"] if seeds else []), *(["answer NLL"] if with_nll else [])]
    head += ["sent", "trained", "client time", *tasks]

    def line(name: str, scores: Mapping[str, Score], nll: float | None, costs: Sequence[str]) -> list[str]:
        spread = scores["mean"].stderr_seeds
        spreads = [show.NONE if spread is None else show.measured(metric, Value(spread))] if seeds else []
        nlls = [show.fixed(nll)] if with_nll else []
        means = (_score(metric, scores[task]) for task in tasks)
        return [name, _score(metric, scores["mean"]), *spreads, *nlls, *costs, *means]

    rows = [line("target, untouched", found.zero_shot, found.zero_shot_nll, ["", "", ""])]
    for row in found.methods:
        costs = [show.size(sent(row)), show.count(row.cost["trainable_parameters"]), _time(row)]
        rows.append(line(_name(row, found), row.scores, row.answer_nll, costs))
    return Table(head, rows)


def _score(metric: str, score: Score) -> str:
    return show.measured(metric, Value(score.value, score.stderr_questions))


def _name(row: MethodResult, found: Analysis) -> str:
    marks = [
        text for text, is_so in (("ceiling", row.label == found.ceiling), (row.scored, row.scored != FUSED)) if is_so
    ]
    return f"{row.label}, {', '.join(marks)}" if marks else row.label


def _time(row: MethodResult) -> str:
    return show.duration(row.cost["client_seconds"])


def sent(row: MethodResult) -> float | None:
    """Return upload and download of all clients and rounds, bytes."""
    up, down = row.cost["upload_bytes"], row.cost["download_bytes"]
    return None if up is None or down is None else up + down


def gain_table(found: Analysis) -> Table:
    """Return what every method gains over the untouched target, and how much of the ceiling's gain that is."""
    head = ["method", "over zero-shot", "95 % interval", "p", "Holm p"]
    ceiling = [f"against {found.ceiling}", "95 % interval", "Holm p", "share of its gain", "95 % interval"]
    rows = []
    for row in found.methods:
        cells = [row.label, *_difference(found.metric, row.against_zero_shot)]
        if found.ceiling:
            difference = _difference(found.metric, row.against_ceiling)
            cells += [*difference[:2], difference[3], *_share(row.recovered)]
        rows.append(cells)
    return Table(head + (ceiling if found.ceiling else []), rows)


def reference_table(found: Analysis) -> Table | None:
    """Return the reference method minus every other; None without a reference or another method."""
    others = [row for row in found.methods if row.label != found.reference]
    if not found.reference or not others:
        return None
    head = [f"{found.reference} minus", "difference", "95 % interval", "p", "Holm p"]
    rows = [[row.label, *_difference(found.metric, row.reference_minus)] for row in others]
    if any(row.reference_minus_nll for row in others):
        head.append(NLL_DIFFERENCE)
        for cells, row in zip(rows, others, strict=True):
            cells.append(show.with_interval(row.reference_minus_nll) if row.reference_minus_nll else show.NONE)
    return Table(head, rows)


def _difference(metric: str, found: Difference | None) -> list[str]:
    if found is None:
        return [show.NONE] * 4
    interval = found.interval
    p_values = [show.NONE if p is None else show.p_value(p) for p in (found.p_value, found.holm_p_value)]
    gain = show.measured_change(metric, Value(interval.estimate))
    return [gain, show.measured_interval(metric, interval.low, interval.high), *p_values]


def _share(found: Interval | None) -> list[str]:
    if found is None:
        return [show.NONE, show.NONE]
    low, high = (percent(bound) if math.isfinite(bound) else "unbounded" for bound in (found.low, found.high))
    return [percent(found.estimate), f"{low} to {high}"]


def percent(share: float) -> str:
    """Return a share in whole per cent: 0.934 -> ``93 %``."""
    return f"{show.signed(100 * share, 0).removeprefix('+')} %"


def cost_table(found: Analysis) -> Table:
    """Return what every method costs and what it shows of the target."""
    head = ["method", "mean", "rounds", "examples seen", "upload", "download", "trained", "client time", "server time"]
    head += ["target disclosed", "proxy alone", "tuned proxy alone"]
    rows = []
    for row in found.methods:
        cost, shown = row.cost, row.exposure
        rows.append(
            [
                row.label,
                percent_or_plain(found.metric, row.scores["mean"].value),
                str(row.rounds),
                show.NONE if cost["examples"] is None else f"{cost['examples']:.0f}",
                show.size(cost["upload_bytes"]),
                show.size(cost["download_bytes"]),
                show.count(cost["trainable_parameters"]),
                _time(row),
                show.duration(cost["server_seconds"]),
                show.percent(shown["disclosed_parameter_share"]),
                percent_or_plain(found.metric, shown["proxy"]),
                percent_or_plain(found.metric, shown["proxy_tuned"]),
            ]
        )
    return Table(head, rows)


def percent_or_plain(metric: str, value: float | None) -> str:
    """Return a value of ``metric`` with its unit: a share in per cent, another one as a plain number."""
    return show.percent(value) if facts(metric).share else show.fixed(value)


def equal_bytes_table(found: Analysis, rounds: Mapping[str, int]) -> Table:
    """Return the scores at equal bytes; a method of which one round alone costs more has none."""
    head = ["method", "rounds", "sent", "examples seen", "mean", "over zero-shot", "95 % interval", "Holm p"]
    by_label = {row.label: row for row in found.methods}
    rows = []
    for label, count in rounds.items():
        row = by_label.get(label)
        if row is None:
            rows.append([label, str(count), *[show.NONE] * 6])
            continue
        examples = show.NONE if row.cost["examples"] is None else f"{row.cost['examples']:.0f}"
        difference = _difference(found.metric, row.against_zero_shot)
        cells = [label, str(count), show.size(sent(row)), examples, _score(found.metric, row.scores["mean"])]
        rows.append([*cells, *difference[:2], difference[3]])
    return Table(head, rows)


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return in what every method differs from what most of them have."""
    rows = [
        [label, ", ".join(f"{key}={_plain(value)}" for key, value in own.items()) or "nothing"]
        for label, own in settings.items()
    ]
    return Table(["method", "differs from what most have in"], rows)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "")

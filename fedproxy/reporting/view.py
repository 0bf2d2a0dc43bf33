"""What the pages show, worked out once for Markdown and HTML: tables of finished text, no markup."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedproxy.metric_facts import facts
from fedproxy.reporting import formatting as show
from fedproxy.reporting.at_sites import site_table
from fedproxy.reporting.pairing import PairedDifference, paired_hint, paired_table
from fedproxy.reporting.privacy import privacy_table
from fedproxy.reporting.round_tables import clients_table, dropped_table, rounds_table
from fedproxy.reporting.run_report import RunReport
from fedproxy.reporting.scores import MODELS, Value, headline_metric, task_metric, task_names, value_of
from fedproxy.reporting.tables import LONGEST_COMMAND, Table, all_shown, shown
from fedproxy.task_means import mean_scores

MODEL_WORDS = {
    "target": "the owner's model, untouched",
    "proxy": "what clients receive",
    "proxy_tuned": "the proxy after federated tuning",
    "fused": "the target after plug-in",
}

_PUBLIC_BASE = (
    "If the target descends from a public base model, clients can tell which blocks were kept: the cosine between the "
    "weights of the proxy and of that base gives the layer map away."
)


@dataclass(frozen=True)
class Headline:
    """Mean score of target and fused, and what lies between them."""

    metric: str
    before: str
    after: str
    difference: str
    gain: float
    """Above 0 where the fused model is better."""
    unit: str = "in per cent"
    points: str = " points"


@dataclass(frozen=True)
class View:
    """One page's content in reading order."""

    title: str
    failed: str | None
    summary: Sequence[tuple[str, str]]
    headline: Headline | None
    notes: Sequence[str]
    models: Sequence[tuple[str, str]]
    scores: Table | None
    score_hint: str
    further: Table | None
    own: Table | None
    cost: Table
    exposure: Sequence[str]
    rounds: Table | None
    rounds_hint: str
    clients: Table | None
    clients_round: int | None
    dropped: Table | None
    repeat: Sequence[str]
    provenance: Table
    paired: Table | None
    paired_hint: str = ""
    by_source: Table | None = None
    held_out: Table | None = None
    by_source_hint: str = ""
    fidelity: Table | None = None
    privacy: Table | None = None
    at_sites: Table | None = None


def build_view(
    report: RunReport,
    folder: str | Path,
    paired: Sequence[PairedDifference] = (),
    by_source: Sequence[PairedDifference] = (),
) -> View:
    """Return the content of the pages of ``report``.

    Args:
        report: The run.
        folder: Where the pages lie; their commands name it.
        paired: Differences to the target on the same questions, where samples were kept.
        by_source: The fused model's, source by source.
    """
    report = presentable(report)
    scores = {model: report.scores[model] for model in MODELS if model in report.scores}
    run = report.run
    return View(
        title=run.recipe,
        failed=(run.error or "no reason was recorded") if run.status == "failed" else None,
        summary=[
            ("Method", run.method),
            ("Status", run.status),
            ("Seed", str(run.seed)),
            ("Started", run.started),
            ("Wall time", show.duration(run.seconds)),
        ],
        headline=_headline(scores, paired),
        notes=report.notes,
        models=[(model, MODEL_WORDS[model]) for model in scores],
        scores=score_table(scores),
        score_hint=score_hint(scores),
        further=_further(scores),
        own=own_scores(report.client_scores),
        cost=_cost(report),
        exposure=_exposure(report),
        rounds=rounds_table(report.rounds),
        rounds_hint=_rounds_hint(report),
        clients=clients_table(report.rounds[-1]) if report.rounds else None,
        clients_round=report.rounds[-1].round if report.rounds else None,
        dropped=dropped_table(report.rounds),
        repeat=_repeat(Path(folder)),
        provenance=_provenance(report),
        paired=paired_table(paired) if paired else None,
        paired_hint=paired_hint(paired) if paired else "",
        held_out=_held_out(scores),
        by_source=paired_table(by_source, "source") if by_source else None,
        by_source_hint=paired_hint(by_source) if by_source else "",
        fidelity=_fidelity(report),
        privacy=privacy_table(report.privacy),
        at_sites=site_table(report.at_sites),
    )


def presentable(report: RunReport) -> RunReport:
    """Return a report as pages take it: tensors, arrays and NaN in one known form, texts on one printable line."""
    return RunReport.from_dict(all_shown(report.to_dict()))


def own_scores(clients: Mapping[str, "Scores"]) -> Table | None:
    """Return one row per client whose models are its own: their mean scores; None where clients were merged."""
    metric = headline_metric({client: _fused_like(models) for client, models in clients.items()})
    if metric is None:
        return None
    kinds = list(dict.fromkeys(model for models in clients.values() for model in models))
    rows = [
        [client, *(show.measured(metric, value_of(mean_scores(models.get(kind, {})), metric)) for kind in kinds)]
        for client, models in clients.items()
    ]
    return Table([f"mean {metric} of", *kinds], rows)


def _fused_like(models: "Scores") -> dict[str, Mapping[str, float | None]]:
    return {"mean": mean_scores(list(models.values())[-1])} if models else {}


Scores = Mapping[str, Mapping[str, Mapping[str, float | None]]]


def _headline(scores: Scores, paired: Sequence[PairedDifference]) -> Headline | None:
    metric = headline_metric({model: scores[model] for model in ("target", "fused") if model in scores})
    if metric is None or not {"target", "fused"} <= set(scores):
        return None
    before, after = (value_of(scores[model]["mean"], metric) for model in ("target", "fused"))
    if before is None or after is None:
        return None
    gain = after.minus(before)
    text = show.measured_change(metric, gain, with_stderr=True)
    for row in paired:
        # samples of another evaluation than the report's say nothing about its numbers
        if row.name == "fused" and row.metric == metric and abs(row.difference.estimate - gain.value) < 1e-9:
            between = show.measured_interval(metric, row.difference.low, row.difference.high)
            text = f"{show.measured_change(metric, gain)} (95 % interval {between})"
    known = facts(metric)
    return Headline(
        metric,
        show.measured(metric, before),
        show.measured(metric, after),
        text,
        gain.value if known.higher_is_better else -gain.value,
        show.unit(metric),
        " points" if known.share else "",
    )


def score_table(scores: Scores) -> Table | None:
    """Return one row per task and the mean, one column per model; None without scores."""
    rows = []
    for task in task_names(scores):
        metric = task_metric(scores, task)
        if metric:
            rows.append([task, *_compared(scores, task, metric), metric, _questions(scores, task)])
    metric = headline_metric(scores)
    if metric and len(rows) > 1:
        rows.append(["mean", *_compared(scores, "mean", metric), metric, _questions(scores, "mean")])
    if not rows:
        return None
    return Table(["task", *scores, "metric", "questions"], rows, strong_last=rows[-1][0] == "mean")


def _compared(scores: Scores, task: str, metric: str) -> list[str]:
    """Return one cell per model: the score with its standard error and, but for the target, the difference to it."""
    base = value_of(scores.get("target", {}).get(task), metric)
    cells = []
    for model, tasks in scores.items():
        value = value_of(tasks.get(task), metric)
        shown = show.measured(metric, value)
        if value and base and model != "target":
            shown += f" ({_change(metric, value.minus(base))})"
        cells.append(shown)
    return cells


def _change(metric: str, value: Value) -> str:
    """Return a difference with its sign; where lower is better, a word says what it means."""
    text = show.measured_change(metric, value)
    if facts(metric).higher_is_better or not value.value:
        return text
    return f"{text}, {'better' if value.value < 0 else 'worse'}"


def _questions(scores: Scores, task: str) -> str:
    sizes = {tasks[task].get("n") for tasks in scores.values() if task in tasks} - {None}
    return " / ".join(f"{int(size or 0)}" for size in sorted(sizes, key=lambda size: size or 0)) or show.NONE


def score_hint(scores: Scores) -> str:
    """Return what a reader of :func:`score_table` should know: units, errors, and what stands in brackets."""
    metrics = [metric for task in task_names(scores) if (metric := task_metric(scores, task))]
    shares, others = (any(facts(metric).share is wanted for metric in metrics) for wanted in (True, False))
    hint = "Per cent, ± one standard error over the questions" if shares else "± one standard error over the questions"
    hint += ", then the difference to target in points." if shares and "target" in scores else "."
    if shares and not others:
        return hint
    nll = " answer_nll: nats per token of the right answers, lower is better." if "answer_nll" in metrics else ""
    if shares:
        return f"{hint} Metrics that are no shares are plain numbers.{nll}"
    difference = ", then the difference to target" if "target" in scores else ""
    return f"± one standard error over the questions{difference}.{nll}"


def _further(scores: Scores) -> Table | None:
    """Return the other metrics' means, one row per model; accuracies and errors in per cent."""
    shown = headline_metric(scores)
    keys = dict.fromkeys(
        key
        for tasks in scores.values()
        for key, value in tasks.get("mean", {}).items()
        if value is not None and key not in ("n", shown) and not key.endswith("_stderr")
    )
    if not keys:
        return None
    return Table(
        ["mean over tasks", *(f"{key} %" if facts(key).share else key for key in keys)],
        [
            [model, *(show.measured(key, value_of(tasks.get("mean"), key)) for key in keys)]
            for model, tasks in scores.items()
        ],
    )


def _held_out(scores: Scores) -> Table | None:
    """Return every metric of sources that have no accuracy: one row per source and model."""
    sources = [task for task in task_names(scores) if task_metric(scores, task) == "answer_nll"]
    found = [(task, model, tasks[task]) for task in sources for model, tasks in scores.items() if task in tasks]
    keys = dict.fromkeys(
        key for _, _, metrics in found for key in metrics if key != "n" and not key.endswith(("_stderr", "_total"))
    )
    if len(keys) < 2:
        return None
    return Table(
        ["source", "model", *(f"{key} %" if facts(key).share else key for key in keys)],
        [
            [task, model, *(show.measured(key, value_of(metrics, key)) for key in keys)]
            for task, model, metrics in found
        ],
    )


def _cost(report: RunReport) -> Table:
    cost = report.cost
    share = (
        f"{show.percent(cost.proxy_parameters / cost.target_parameters)} of the target"
        if cost.proxy_parameters is not None and cost.target_parameters
        else ""
    )
    rows = [
        ("Target", show.count(cost.target_parameters), "parameters"),
        ("Proxy", show.count(cost.proxy_parameters), f"parameters, {share}" if share else "parameters"),
        ("Trained by clients", show.count(cost.trainable_parameters), "parameters"),
        ("Uploaded", show.size(cost.upload_bytes), "clients to server, all rounds"),
        ("Downloaded", show.size(cost.download_bytes), "server to clients, all rounds"),
        ("Client time", show.duration(cost.client_seconds), "local training, summed over clients"),
        ("Server time", show.duration(cost.server_seconds), "compression, aggregation, fusion"),
        ("Evaluation time", show.duration(cost.evaluation_seconds), "scoring of all models"),
        ("Peak memory", show.size(cost.peak_memory_bytes), "resident, one process"),
    ]
    return Table(["what", "amount", ""], [row for row in rows if row[1] != show.NONE])


def _fidelity(report: RunReport) -> Table | None:
    found = report.fidelity
    if found is None:
        return None
    rows = [
        ("KL(target || proxy), nats per token", "0", show.fixed(found.kl)),
        ("perplexity", show.number(found.target_perplexity, 4), show.number(found.proxy_perplexity, 4)),
        ("tokens per second", f"{found.target_tokens_per_second:.0f}", f"{found.proxy_tokens_per_second:.0f}"),
        ("parameters", show.count(report.cost.target_parameters), show.count(report.cost.proxy_parameters)),
    ]
    return Table([f"on {found.tokens:,} held-out tokens", "target", "proxy"], rows)


def _exposure(report: RunReport) -> list[str]:
    exposure, lines = report.exposure, []
    if exposure.disclosed_parameter_share is not None:
        share = show.percent(exposure.disclosed_parameter_share)
        lines += [f"Clients hold {share} of the target's parameters (the proxy).", _PUBLIC_BASE]
    for gap, owner, held in (
        (exposure.proxy_gap, "the target", "the proxy they receive"),
        (exposure.proxy_tuned_gap, "the fused model", "the tuned proxy they end with"),
    ):
        if gap is not None:
            side = "above" if gap >= 0 else "below"
            lines.append(f"By mean score, {owner} is {abs(100 * gap):.1f} points {side} {held}.")
    lines.append(
        "This is reduced exposure, not a guarantee: nothing here proves that the target cannot be rebuilt from the "
        "proxy, or a client's rows from its update."
    )
    return lines


def _rounds_hint(report: RunReport) -> str:
    found = report.validation
    if found is None:
        return ""
    scored = "fused model" if found.model == "fused" else "tuned proxy"
    if found.evaluator is None:
        text = f"Validation: the {scored} on {found.questions} training rows that no client owns."
    else:
        text = f"The {scored} on the {found.questions} questions of the final scores ({found.evaluator})."
    if found.fused_after_round is None:
        return text
    why = f"the best by mean {found.metric}" if found.select == "best" else "the last"
    return f"{text} The state after round {found.fused_after_round} was fused, {why}."


def _repeat(folder: Path) -> list[str]:
    """Return the commands that repeat the run and rebuild its pages; config.yaml is itself a recipe."""
    if folder.is_absolute() and folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    name = folder.resolve().name or "run"  # of . and .. too
    again = folder.parent / f"{name}-again" if folder.name not in ("", "..") else folder / ".." / f"{name}-again"
    recipe, first, second = (shlex.quote(str(path)) for path in (folder / "config.yaml", folder, again))
    commands = [
        f"python -m fedproxy.fit recipe={recipe} output_dir={second}",
        f"python -m fedproxy.report {first} {second}",
    ]
    return [shown(command, LONGEST_COMMAND) for command in commands]


def _provenance(report: RunReport) -> Table:
    origin = report.provenance
    data = origin.data_sha256
    hashes = {"data": data} if isinstance(data, str) else {f"data {name}": text for name, text in (data or {}).items()}
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())),
        ("git commit", origin.git_commit or ""),
        ("target SHA-256", origin.target_sha256 or ""),
        *((f"{name} SHA-256", text) for name, text in hashes.items()),
        *(
            (name.removesuffix("_bytes").replace("_", " "), _hardware(name, value))
            for name, value in origin.hardware.items()
        ),
    ]
    return Table(["what", ""], [row for row in rows if row[1]])


def _hardware(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        return show.size(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)

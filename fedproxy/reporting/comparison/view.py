"""What the comparison's pages show, worked out once for Markdown and HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedproxy.metric_facts import facts
from fedproxy.reporting import formatting as show
from fedproxy.reporting.comparison.analysis import Analysis, MethodResult
from fedproxy.reporting.comparison.tables import (
    cost_table,
    equal_bytes_table,
    gain_table,
    percent,
    percent_or_plain,
    reference_table,
    score_table,
    settings_table,
)
from fedproxy.reporting.scores import Value
from fedproxy.reporting.tables import LONGEST_COMMAND, Table, shown

_SCORES = """Sent: upload and download of all clients and rounds. Client time: local training, summed over clients.
Answer NLL: nats per answer token, lower is better."""
_GAINS = """Points on the same questions, answers averaged over seeds; 95 % interval of a paired bootstrap over
questions, stratified by task; p of a sign-flip randomisation test, Holm-corrected over the methods of its column. Seeds
are taken as they are: the interval says what other questions would do, “± seeds” what other seeds did."""
_PLAIN_GAINS = _GAINS.replace(
    "Points on", "How much better the metric is (of one that should be low: how much lower) on", 1
)
_REFERENCE = """The same statistics; above 0 the reference is better. Answer NLL: nats per token of each right answer,
mean over questions and tasks (a report weighs a task's questions by their tokens); below 0 the reference is better."""
_COSTS = """Means over seeds. Proxy alone and tuned proxy alone: what clients hold at the beginning and at the end.
Reduced exposure is no guarantee: nothing here proves that a target cannot be rebuilt from its proxy, and if the target
descends from a public base model, the cosine of weights gives the layer map away."""
_EQUAL_BYTES = """Examples seen differ. A run of fewer rounds is the beginning of the longer one: the learning rate is
constant. A method of which one round alone costs more has no score."""


@dataclass(frozen=True)
class RunLine:
    """What became of one run."""

    method: str
    seed: int
    status: str
    """``completed``, ``failed`` or ``not run``."""
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class EqualBytes:
    """The second table."""

    analysis: Analysis
    budget_bytes: int
    rounds: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """Everything that the pages are made of."""

    title: str
    command: str
    analysis: Analysis
    seeds: Sequence[int]
    questions: int
    runs: Sequence[RunLine]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per method the settings in which it differs from what most methods have."""
    budget: str = "equal"
    equal_bytes: EqualBytes | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a table and what to know about it."""

    title: str
    table: Table
    hints: Sequence[str]
    words: bool = False
    """Whether its cells are words, which wrap, and not numbers."""


@dataclass(frozen=True)
class ComparisonView:
    """One page in reading order."""

    title: str
    command: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    findings: Sequence[str]
    sections: Sequence[Section]


def build_view(found: Comparison) -> ComparisonView:
    """Return the content of the comparison's pages."""
    analysis = found.analysis
    failed = [f"{line.method}, seed {line.seed}, failed: {line.error}" for line in found.runs if line.error]
    waiting = [f"{line.method}, seed {line.seed}" for line in found.runs if line.status == "not run"]
    notes = [*found.notes, *failed]
    if waiting:
        notes.append(f"Not run yet: {'; '.join(waiting)}. The tables hold what is there.")
    return ComparisonView(
        title=shown(found.title),
        command=shown(found.command, LONGEST_COMMAND),
        facts=[
            ("Methods", str(len(analysis.methods))),
            ("Seeds", ", ".join(map(str, found.seeds))),
            ("Questions", str(found.questions)),
            ("Metric", analysis.metric),
        ],
        notes=[shown(note) for note in notes],
        findings=[shown(line) for line in _findings(analysis)],
        sections=[*_sections(found), *_second_table(found), *_about_runs(found)],
    )


def _findings(found: Analysis) -> list[str]:
    zero_shot = percent_or_plain(found.metric, found.zero_shot["mean"].value)
    lines = [f"The untouched target scores {zero_shot} in the mean over tasks."]
    rows = {row.label: row for row in found.methods}
    for label, word in ((found.ceiling, "the ceiling"), (found.reference, "the reference")):
        row = rows.get(label or "")
        if row is not None:
            reached = percent_or_plain(found.metric, row.scores["mean"].value)
            lines.append(f"{label} ({word}) scores {reached}{_gain(found.metric, row)}.")
    below = [row.label for row in found.methods if _sure(row)]
    if found.reference:
        names = ", ".join(below) or "no other method"
        better = "above" if facts(found.metric).higher_is_better else "better than"
        lines.append(f"{found.reference} is {better} {names} with a 95 % interval that excludes 0.")
    return lines


def _gain(metric: str, row: MethodResult) -> str:
    if row.against_zero_shot is None:
        return ""
    interval = row.against_zero_shot.interval
    gain = show.measured_change(metric, Value(interval.estimate))
    words = " points" if facts(metric).share else " better" if interval.estimate > 0 else ""
    text = f", {gain}{words} ({show.measured_interval(metric, interval.low, interval.high)})"
    if row.recovered is None or row.against_ceiling is None:
        return text
    return f"{text}, which is {percent(row.recovered.estimate)} of the ceiling's gain"


def _sure(row: MethodResult) -> bool:
    return row.reference_minus is not None and row.reference_minus.interval.low > 0


def _sections(found: Comparison) -> list[Section]:
    analysis = found.analysis
    spread = " “± seeds” is that of the seeds' means." if len(found.seeds) > 1 else ""
    sections = [
        Section(
            "Scores",
            score_table(analysis),
            [
                f"{analysis.metric} {show.unit(analysis.metric)}, mean over seeds, ± one standard error over the "
                f"questions.{spread} {_line(_SCORES)}"
            ],
        ),
        Section(
            "Gain over zero-shot" + (f", and {analysis.ceiling} as the ceiling" if analysis.ceiling else ""),
            gain_table(analysis),
            [_line(_GAINS if facts(analysis.metric).share else _PLAIN_GAINS)],
        ),
    ]
    reference = reference_table(analysis)
    if reference is not None:
        sections.append(Section(f"{analysis.reference} against every other method", reference, [_line(_REFERENCE)]))
    return [*sections, Section("Cost and exposure", cost_table(analysis), [_line(_COSTS)])]


def _second_table(found: Comparison) -> list[Section]:
    second = found.equal_bytes
    if second is None:
        return []
    hint = f"Every method ran as many whole rounds as {show.size(second.budget_bytes)} pay for. {_line(_EQUAL_BYTES)}"
    return [Section("At equal bytes", equal_bytes_table(second.analysis, second.rounds), [hint])]


def _about_runs(found: Comparison) -> list[Section]:
    seen = {row.cost["examples"] for row in found.analysis.methods if row.cost["examples"]}
    budget = (
        "all that train saw the same number of examples" if len(seen) <= 1 else "the number of examples seen differs"
    )
    same = f"Target, rows, prompts and questions are the same for all methods; {budget}."
    runs = Table(
        ["run", "status", "wall time"],
        [[f"{line.method}, seed {line.seed}", line.status, show.duration(line.seconds)] for line in found.runs],
    )
    hint = "Work that a run took over from an equal one is counted with the time that it took there."
    return [
        Section("What differs between the methods", settings_table(found.settings), [same], words=True),
        Section("Runs", runs, [hint]),
    ]


def _line(text: str) -> str:
    return " ".join(text.split())

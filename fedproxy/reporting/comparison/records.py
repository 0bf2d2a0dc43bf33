"""What stays of one run of a comparison: its configuration, its report and its answers, in one small file.

A record is all that the comparison's pages need, so that a study can be finished in parts, its records committed and
its run folders deleted.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError, EvaluationError, one_line
from fedproxy.files import packed, plain, read_json, write_bytes
from fedproxy.metric_facts import HEADLINES
from fedproxy.reporting.run_report import RunReport
from fedproxy.reporting.samples import Evaluation, kept_models, load_evaluation
from fedproxy.reporting.schema import SchemaError, decode

SCHEMA_VERSION = 1
_METRICS = ("acc", "acc_norm", *HEADLINES[2:])
_DIGITS = 6


@dataclass(frozen=True)
class Answers:
    """One model's answers to one task, questions in the order of their keys."""

    settings: Mapping[str, Any]
    """Task version, number of examples shown, hash of the task's configuration, lm-eval's version."""
    questions_sha256: str
    """Hash of the questions' keys and prompts: equal hashes mean that the answers pair up."""
    values: Mapping[str, Sequence[float]]
    """Metric to one number per question: those of ``metric_facts.HEADLINES``, as far as every question has it."""


@dataclass(frozen=True)
class Record:
    """One finished run."""

    method: str
    """Its row in the comparison."""
    seed: int
    config: Mapping[str, Any]
    """The whole configuration, as in config.yaml."""
    report: RunReport
    answers: Mapping[str, Mapping[str, Answers]] = field(default_factory=dict)
    """Model to task to answers."""
    examples: int | None = None
    """Rows seen in training, all clients, rounds and epochs."""

    @classmethod
    def of_run(
        cls, run: str | Path, method: str, config: Mapping[str, Any], report: RunReport, examples: int | None
    ) -> "Record":
        """Return the record of the finished run in the folder ``run``.

        Raises:
            EvaluationError: If its samples cannot be read.
        """
        answers = {model: _answers(load_evaluation(run, model)) for model in kept_models(run)}
        return cls(method, report.run.seed, plain(config), RunReport.from_dict(report.to_dict()), answers, examples)

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON packed by gzip, whole or not at all."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "seed": self.seed,
            "examples": self.examples,
            "config": self.config,
            "report": self.report.to_dict(),
            "answers": {
                model: {task: dataclasses.asdict(own) for task, own in tasks.items()}
                for model, tasks in self.answers.items()
            },
        }
        return write_bytes(path, packed(json.dumps(plain(content), allow_nan=False)))

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Read a record.

        Raises:
            CheckpointError: If it cannot be read or is none.
        """
        remedy = "delete it to run that again"
        data = read_json(path, dict, remedy=remedy)
        try:
            if data["schema_version"] != SCHEMA_VERSION:
                raise SchemaError(f"schema_version must be {SCHEMA_VERSION}, got {data['schema_version']!r}")
            RunReport.from_dict(data["report"], str(path))  # its own rules, and its own words where one is broken
            record = decode(cls, data)
            _check_answers(record.answers)
        except (ValueError, KeyError, TypeError, CheckpointError) as error:
            raise CheckpointError(f"{path} is not the record of a run ({one_line(error)}); {remedy}") from None
        return record


def _check_answers(answers: Mapping[str, Mapping[str, Answers]]) -> None:
    """Refuse answers that do not pair up: of other tasks than the first model's, or of several numbers of questions."""
    tasks = next((sorted(own) for own in answers.values()), [])
    for model, found in answers.items():
        if sorted(found) != tasks or not tasks:
            raise SchemaError(f"answers.{model} must have the tasks of all other models, got {sorted(found)}")
        for task, own in found.items():
            counts = {len(values) for values in own.values.values()}
            if len(counts) > 1 or 0 in counts:
                raise SchemaError(f"answers.{model}.{task}.values must hold one number per question for every metric")
            if not all(math.isfinite(value) for values in own.values.values() for value in values):
                raise SchemaError(f"answers.{model}.{task}.values must be finite")


def _answers(evaluation: Evaluation) -> dict[str, Answers]:
    found = {}
    for task, questions in evaluation.questions.items():
        keys = sorted(questions)
        metrics = [metric for metric in _METRICS if all(questions[key].get(metric) is not None for key in keys)]
        digest = hashlib.sha256("".join(f"{key}\x00{questions[key].get('prompt_hash')}\x00" for key in keys).encode())
        values = {metric: tuple(_short(questions[key][metric]) for key in keys) for metric in metrics}
        found[task] = Answers(evaluation.settings[task], digest.hexdigest(), values)
    return found


def _short(value: float) -> float:
    return int(value) if value == int(value) else round(float(value), _DIGITS)


def require_same_questions(records: Mapping[str, Record]) -> None:
    """Refuse records of runs that asked different questions, asked them differently, or learned from other rows.

    Args:
        records: By the name that an error calls them.

    Raises:
        EvaluationError: One line that names two records and what differs.
    """
    first: dict[str, tuple[str, Answers]] = {}
    rows: dict[int, tuple[str, Any]] = {}
    target: tuple[str, Any] | None = None
    tasks: tuple[str, Any] | None = None
    for name, record in records.items():
        origin = record.report.provenance
        known = rows.setdefault(record.seed, (name, origin.data_sha256))
        _require_equal("data_sha256", name, origin.data_sha256, known)
        target = target or (name, origin.target_sha256)
        _require_equal("target_sha256", name, origin.target_sha256, target)
        for found in record.answers.values():
            for task, own in found.items():
                other, before = first.setdefault(task, (name, own))
                _require_equal(f"number of questions of {task}", name, _count(own), (other, _count(before)))
                for key in sorted(own.settings.keys() | before.settings.keys()):
                    pair = own.settings.get(key), (other, before.settings.get(key))
                    _require_equal(f"{key} of {task}", name, *pair)
                _require_equal(f"questions of {task}", name, own.questions_sha256, (other, before.questions_sha256))
            tasks = tasks or (name, sorted(found))
            _require_equal("tasks", name, sorted(found), tasks)


def _count(answers: Answers) -> int:
    return len(next(iter(answers.values.values()), ()))


def _require_equal(what: str, name: str, value: Any, known: tuple[str, Any]) -> None:
    if value != known[1]:
        raise EvaluationError(
            f"{known[0]} and {name} cannot be compared: {what} is {_brief(known[1])} and {_brief(value)}; "
            "delete one of the two records to run it again"
        )


def _brief(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text

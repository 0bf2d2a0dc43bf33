"""Per-question results of a run, kept so that any two models or runs can be compared later on the same questions.

``<run>/evaluation/<model>.samples.jsonl`` has one question a line; ``<run>/evaluation/<model>.json`` is lm-eval's own
results file with one more key, ``tasks``, that says what has to agree before two evaluations may be compared.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.errors import EvaluationError, one_line
from fedproxy.files import parse_json, plain, read_whole, write_json, write_text
from fedproxy.metric_facts import HEADLINES
from fedproxy.reporting.scores import MODELS

Sample = Mapping[str, Any]
_METRICS = HEADLINES
"""Metrics of a question that must be numbers."""


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to every question, and the settings they were asked under."""

    name: str
    """Where it comes from, for errors."""
    settings: Mapping[str, Mapping[str, Any]]
    """Per task: version, num_fewshot, config_sha256 ..., and under ``lm_eval`` its version."""
    questions: Mapping[str, Mapping[str, Sample]]
    """Per task: question key to sample."""

    def values(self, task: str, metric: str) -> list[float]:
        """Return ``metric`` of every question of ``task`` in the order of the keys."""
        return [float(self.questions[task][key][metric]) for key in sorted(self.questions[task])]

    def by_task(self, metric: str) -> list[list[float]]:
        """Return :meth:`values` of every task, tasks by name: what the functions of ``statistics`` take."""
        return [self.values(task, metric) for task in sorted(self.questions)]

    def has(self, metric: str) -> bool:
        """Return whether every question has ``metric``."""
        return all(sample.get(metric) is not None for task in self.questions.values() for sample in task.values())


def save_evaluation(run: str | Path, model: str, samples: Iterable[Sample], lm_eval: Mapping[str, Any]) -> None:
    """Keep one model's samples and lm-eval's results under ``<run>/evaluation``.

    Args:
        run: The run's folder.
        model: ``target``, ``proxy``, ``proxy_tuned`` or ``fused``.
        samples: Per question ``task``, ``doc_id``, ``doc_hash``, ``acc`` and what else was measured.
        lm_eval: lm-eval's results: ``versions``, ``n-shot``, ``configs`` and ``lm_eval_version`` are read.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    folder = Path(run) / "evaluation"
    write_text(folder / f"{model}.samples.jsonl", sample_lines(samples))
    write_json(folder / f"{model}.json", {**lm_eval, "tasks": task_settings(lm_eval)})


def sample_lines(samples: Iterable[Sample]) -> str:
    """Return samples as JSON, a line each; what is not a number (NaN, infinities) is null."""
    lines = (json.dumps(plain(sample), ensure_ascii=False, allow_nan=False) for sample in samples)
    return "".join(f"{line}\n" for line in lines)


def task_settings(lm_eval: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return per task what two evaluations must share: versions, examples shown and hash of the configuration."""
    configs: Mapping[str, Any] = lm_eval.get("configs", {})
    return {
        task: {
            "version": lm_eval.get("versions", {}).get(task),
            "num_fewshot": lm_eval.get("n-shot", {}).get(task),
            "config_sha256": _config_sha256(config),
            "lm_eval": lm_eval.get("lm_eval_version"),
        }
        for task, config in configs.items()
    }


def _config_sha256(config: Any) -> str:
    text = json.dumps(plain(config), sort_keys=True)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # lm-eval writes some functions with their address in this process
    return hashlib.sha256(text.encode()).hexdigest()


def kept_models(run: str | Path) -> list[str]:
    """Return the models of a run whose samples were kept, in the order of a report."""
    return [model for model in MODELS if (Path(run) / "evaluation" / f"{model}.samples.jsonl").is_file()]


def load_evaluation(run: str | Path, model: str) -> Evaluation:
    """Read one model's samples.

    Raises:
        EvaluationError: If a file is missing or broken; the line names it.
    """
    folder = Path(run) / "evaluation"
    questions: dict[str, dict[str, Sample]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for sample in load_samples(run, model):
        document = (sample["task"], str(sample["doc_hash"]))
        seen[document] += 1  # a data set may hold a question twice
        questions.setdefault(sample["task"], {})[f"{document[1]}/{seen[document]}"] = sample
    return Evaluation(f"{Path(run)} {model}", _settings(folder / f"{model}.json", questions), questions)


def load_samples(run: str | Path, model: str) -> list[dict[str, Any]]:
    """Read one model's samples in the order in which they were kept.

    Raises:
        EvaluationError: If the file is missing or broken; the line names it.
    """
    path = Path(run) / "evaluation" / f"{model}.samples.jsonl"
    text = _read(path)
    lines = text.removesuffix("\n").split("\n") if text else []  # `splitlines` would break a text at its U+2028
    return [_sample(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _read(path: Path) -> str:
    try:
        return read_whole(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise EvaluationError(f"cannot read {path} ({reason}); evaluate the run again to get its samples") from None


def _sample(line: str, where: str) -> dict[str, Any]:
    try:
        sample: dict[str, Any] = parse_json(line, dict)
    except ValueError as error:
        raise EvaluationError(f"{where} cannot be used: {error}; evaluate the run again") from None
    missing = [key for key in ("task", "doc_hash") if not isinstance(sample.get(key), str)]
    if missing:
        raise EvaluationError(f"{where} lacks {' and '.join(missing)}; evaluate the run again")
    for metric, value in sample.items():
        if metric in _METRICS and value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            got = one_line(value, 40)
            raise EvaluationError(f"{where}: {metric} must be a number, got {got}; evaluate the run again")
    return sample


def _settings(path: Path, tasks: Iterable[str]) -> dict[str, dict[str, Any]]:
    try:
        found = parse_json(_read(path), dict).get("tasks", {})
        return {task: dict(found.get(task, {})) for task in tasks}
    except (ValueError, AttributeError, TypeError) as error:
        reason = one_line(error)
        raise EvaluationError(f"{path} is not an evaluation's result file ({reason}); evaluate the run again") from None


def require_comparable(first: Evaluation, second: Evaluation) -> None:
    """Refuse two evaluations that asked different questions or asked them differently.

    Raises:
        EvaluationError: If tasks, their versions, configurations, prompts or questions differ; one line says which.
    """
    one, other = set(first.questions), set(second.questions)
    problems = [f"task {task} is only in {first.name}" for task in sorted(one - other)]
    problems += [f"task {task} is only in {second.name}" for task in sorted(other - one)]
    for task in sorted(one & other):
        problems += _differences(task, first, second)
    if not one | other:
        problems = ["there are no questions"]
    if problems:
        raise EvaluationError(
            f"{first.name} and {second.name} cannot be paired: {'; '.join(problems)}; "
            "evaluate both with the same tasks, limit and versions"
        )


def _differences(task: str, first: Evaluation, second: Evaluation) -> list[str]:
    before, after = first.settings[task], second.settings[task]
    problems = [
        f"{task} has {_words(key)} {_short(before.get(key))} against {_short(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    one, other = first.questions[task], second.questions[task]
    alone = len(one.keys() ^ other.keys())
    if alone:
        problems.append(
            f"{task} has {alone} questions that only one of them answered ({len(one)} against {len(other)})"
        )
    prompts = _count_unequal(one, other, "prompt_hash")
    if prompts:
        problems.append(f"{task} has other prompts at {prompts} of {len(one)} questions")
    return problems


def _count_unequal(one: Mapping[str, Sample], other: Mapping[str, Sample], field: str) -> int:
    return sum(one[key].get(field) != other[key].get(field) for key in one.keys() & other.keys())


def _words(key: str) -> str:
    return {"config_sha256": "configuration", "lm_eval": "lm-eval"}.get(key, key)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def common_metric(evaluations: Sequence[Evaluation]) -> str:
    """Return the first of :data:`fedproxy.metric_facts.HEADLINES` that every question of all evaluations has.

    Raises:
        EvaluationError: If the questions have none in common.
    """
    for metric in HEADLINES:
        if all(evaluation.has(metric) for evaluation in evaluations):
            return metric
    names = ", ".join(evaluation.name for evaluation in evaluations)
    raise EvaluationError(
        f"{names}: the questions have none of {', '.join(HEADLINES)} in common, by which models can be paired"
    )

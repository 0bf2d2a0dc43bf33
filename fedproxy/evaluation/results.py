"""From lm-eval's logged samples and results to plain scores, small records per question, and a results.json."""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedproxy.evaluation.answer_metrics import choice_margin, score_answers
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.task_means import mean_scores


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation of one model found."""

    scores: dict[str, dict[str, float]]
    """By task: lm-eval's metrics and standard errors, ``n`` questions, and the metrics of ``answer_metrics``."""
    mean: dict[str, float | None]
    """Mean over tasks (:func:`fedproxy.task_means.mean_scores`); None where a task has no finite value."""
    samples: list[dict[str, Any]] = field(repr=False)
    """By question: task, doc_id, hashes, gold, log-likelihood per choice, acc, acc_norm, gold-answer NLL."""
    lm_eval: dict[str, Any] = field(repr=False)
    """lm-eval's own results (versions, configurations, n-shot), without samples: the content of its results.json. Other
    evaluators say in the same form what two evaluations must share to be compared."""
    seconds: float
    """Wall time, loading of tasks included."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the scores should know: prompts that were cut, prefixes that could not be shared."""


def merged(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """Return the results of several evaluators of one model as one."""
    if len(results) == 1:
        return results[0]
    scores = {task: metrics for result in results for task, metrics in result.scores.items()}
    return EvaluationResult(
        scores=scores,
        mean=mean_scores(scores),
        samples=[sample for result in results for sample in result.samples],
        lm_eval=merged_details([result.lm_eval for result in results]),
        seconds=sum(result.seconds for result in results),
        notes=[note for result in results for note in result.notes],
    )


def merged_details(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of several results files as one: mappings by task join, of all else the last one's stays."""
    details: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            known = details.get(key)
            details[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return details


def question_samples(
    task: LoadedTask, logged: Sequence[Mapping[str, Any]], answer_tokens: Mapping[tuple[str, str], int]
) -> list[dict[str, Any]]:
    """Return one small record per question from lm-eval's logged samples."""
    samples = []
    for entry in logged:
        if entry["filter"] != logged[0]["filter"]:
            continue
        sample = {"task": task.name, **{key: entry[key] for key in ("doc_id", "doc_hash", "prompt_hash")}}
        sample |= {name: entry[name] for name in entry["metrics"] if isinstance(entry[name], (int, float))}
        gold = task.gold(entry["doc"]) if task.multiple_choice else None
        if gold is not None:
            choices = len(task.requests(entry["doc"]))
            loglikelihoods = [float(response[0]) for response in entry["filtered_resps"][:choices]]
            tokens = answer_tokens[tuple(entry["arguments"][gold][:2])]
            sample |= {
                "gold": gold,
                "loglikelihoods": loglikelihoods,
                "answer_tokens": tokens,
                "answer_nll": -loglikelihoods[gold] / tokens,
                "margin": float(choice_margin(torch.tensor(loglikelihoods, dtype=torch.float64), gold)),
            }
        samples.append(sample)
    return samples


def no_numbers(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for every source with questions at which a model's likelihoods are NaN: it says nothing there.

    Of choices whose likelihood is NaN the first one counts as the answer, so that an accuracy looks like any other.
    """
    asked, lost = Counter[str](), Counter[str]()
    for sample in samples:
        values = [*sample.get("loglikelihoods", ()), sample.get("answer_nll", 0.0)]
        asked[sample["task"]] += 1
        lost[sample["task"]] += any(map(math.isnan, values))
    return [
        f"{task}: at {count} of {asked[task]} questions the model's likelihoods are not numbers (NaN), and its scores "
        "there mean nothing; load it in another dtype, or look at its weights."
        for task, count in lost.items()
        if count
    ]


def missing_stderrs(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the standard error of accuracies where lm-eval gave none because another metric would need a bootstrap.

    The formula is lm-eval's own: sample standard deviation over the square root of the number of questions.
    """
    found = {}
    for metric in ("acc", "acc_norm"):
        values = torch.tensor([float(sample[metric]) for sample in samples if metric in sample], dtype=torch.float64)
        if results.get(f"{metric}_stderr,none") == "N/A" and len(values) > 1:
            found[f"{metric}_stderr,none"] = float(values.std()) / math.sqrt(len(values))
    return found


def task_scores(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return lm-eval's numbers for one task, and ours from the same log-likelihoods."""
    scores: dict[str, float] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, (int, float)) and not isinstance(value, bool):
            scores[metric if kind == "none" else f"{metric}:{kind}"] = float(value)
    scores |= {name: value for name, value in _first_filter(results, samples).items() if name not in scores}
    scores["n"] = len(samples)
    if samples and all("gold" in sample for sample in samples):
        scores |= score_answers([(s["loglikelihoods"], s["gold"], s["answer_tokens"]) for s in samples])
    return scores


def _first_filter(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of a task's first filter, whose answers the samples have, under their plain names."""
    found: dict[str, float] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        known = kind and isinstance(value, int | float) and metric.removesuffix("_stderr") in samples[0]
        if known and metric not in found:
            found[metric] = float(value)
    return found


def plain_results(raw: dict[str, Any], settings: dict[str, Any], tasks: Mapping[str, LoadedTask]) -> dict[str, Any]:
    """Return lm-eval's results as plain JSON values, free of this machine's paths."""
    import lm_eval
    import transformers
    from lm_eval.utils import handle_non_serializable

    raw = {**raw, "config": settings, "date": time.time()}
    raw |= {"lm_eval_version": lm_eval.__version__, "transformers_version": transformers.__version__}
    raw["configs"] = {name: tasks[name].public_config(config) for name, config in raw["configs"].items()}
    plain: dict[str, Any] = json.loads(json.dumps(raw, default=handle_non_serializable))
    return plain

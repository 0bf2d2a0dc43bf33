"""lm-eval in process: scores a model, renders training rows, and checks what a recipe asks for.

lm-eval is imported when it is first needed, so that importing this module stays cheap. Prompts, targets and metrics are
always lm-eval's own; for the tasks of :func:`task_names` the documents come from the local cache.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedproxy.data.rows import Row
from fedproxy.errors import EvaluationError
from fedproxy.evaluation.answer_metrics import choice_margin, score_answers
from fedproxy.evaluation.loaded_task import LoadedTask, Split
from fedproxy.evaluation.offline_tasks import missing_assets, task_names
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_checks import check_metrics, check_rows, check_settings, check_task
from fedproxy.evaluation.task_loading import load_task, needed_splits
from fedproxy.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "METRICS",
    "EvaluationResult",
    "check_tasks",
    "evaluate_model",
    "missing_assets",
    "render_rows",
    "task_names",
]

METRICS = ("acc", "acc_norm", "answer_nll", "answer_nll_total", "margin", "ece")
"""Names of a multiple-choice task's scores; each but ``ece`` and ``answer_nll`` is a mean over questions."""

Progress = Callable[[int, int], None]
"""Called with (requests done, requests in all)."""


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation of one model found."""

    scores: dict[str, dict[str, float]]
    """By task: lm-eval's metrics and standard errors, ``n`` questions, and the metrics of ``answer_metrics``."""
    mean: dict[str, float]
    """Mean over tasks of every score that all tasks have; ``n`` is the sum, a ``_stderr`` that of the mean."""
    samples: list[dict[str, Any]]
    """By question: task, doc_id, hashes, gold, log-likelihood per choice, acc, acc_norm, gold-answer NLL."""
    lm_eval: dict[str, Any]
    """lm-eval's own results (versions, configurations, n-shot), without samples: the content of its results.json."""
    seconds: float
    """Wall time, loading of tasks included."""


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 16,
    batch_tokens: int = 2048,
    seed: int = 0,
    split: Split | None = None,
    progress: bool | Progress = False,
) -> EvaluationResult:
    """Score a causal language model on lm-eval tasks.

    Args:
        model: The model, on its device; its weights are not changed and its training mode is restored.
        tokenizer: Its tokenizer.
        tasks: Task names: those of :func:`task_names` run on local files, any other through the hub.
        limit: Only the first ``limit`` documents of each task; None is all.
        num_fewshot: Solved examples before each question, drawn from the train split with ``seed``.
        batch_size: Sequences per forward where requests do not share prefixes (generation, fallback).
        batch_tokens: Tokens per forward where they do.
        seed: Seed of the few-shot sampler.
        split: Score on ``test`` or ``validation``; None is lm-eval's choice (test where there is one).
        progress: True shows a bar, a function is called with (done, total).

    Raises:
        EvaluationError: If a task is unknown or has no data, or a setting does not fit it.
    """
    from lm_eval.evaluator import evaluate

    from fedproxy.evaluation.prefix_sharing import PrefixSharingLM

    check_tasks(tasks, limit=limit, num_fewshot=num_fewshot, split=split)
    start, training = time.perf_counter(), model.training
    needs = {name: needed_splits(name, split, num_fewshot) for name in tasks}
    loaded = {task.name: task for name in tasks for task in load_task(name, split, needs[name])}
    for task in loaded.values():
        task.prepare(num_fewshot, seed)
    with quiet(), _bar(progress) as report:
        lm = PrefixSharingLM(model, tokenizer, batch_size=batch_size, batch_tokens=batch_tokens, on_progress=report)
        try:
            raw = evaluate(
                lm=lm,
                task_dict={"tasks": {name: task.task for name, task in loaded.items()}},
                limit=limit,
                bootstrap_iters=1 if all(task.only_means for task in loaded.values()) else 0,
            )
        finally:
            model.train(training)
    logged = raw.pop("samples")
    samples = {name: _question_samples(task, logged[name], lm.answer_tokens) for name, task in loaded.items()}
    for name, results in raw["results"].items():
        results |= _missing_stderrs(results, samples[name])
    scores = {name: _task_scores(raw["results"][name], samples[name]) for name in loaded}
    settings = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "split": split, "sharing": lm.sharing}
    return EvaluationResult(
        scores=scores,
        mean=mean_scores(scores),
        samples=[sample for name in loaded for sample in samples[name]],
        lm_eval=_plain_results(raw, settings, loaded),
        seconds=time.perf_counter() - start,
    )


def check_tasks(
    names: Sequence[str],
    limit: int | None = None,
    num_fewshot: int = 0,
    metrics: Sequence[str] = (),
    split: Split | None = None,
) -> None:
    """Raise one clear line if an evaluation could not run as asked; local tasks are checked without loading them.

    Raises:
        EvaluationError: If a task is unknown or has no data, ``limit`` or ``num_fewshot`` is above it, or a metric is
            unknown.
    """
    check_settings(names, limit, num_fewshot, split)
    check_metrics(metrics, METRICS)
    for name in names:
        check_task(name, limit, num_fewshot, split)


def render_rows(task: str, split: str = "train", limit: int | None = None, seed: int | None = None) -> list[Row]:
    """Return training rows as the lm-eval task of that name renders its questions, so that tuning and scoring agree.

    The prompt is the context of the gold choice and the target its continuation, exactly as lm-eval would request
    them: usually the question and delimiter plus answer text; for winogrande, whose context depends on the choice,
    the sentence up to the filled blank and its rest.

    Args:
        task: Task name, multiple choice.
        split: ``train``, ``validation`` or ``test``.
        limit: At most this many rows; None is all.
        seed: Draw the rows with this seed, without replacement; None takes the first ones.

    Raises:
        EvaluationError: If the task or the split has no data, or the task is not multiple choice.
    """
    check_rows(task, split, limit)
    with quiet():
        (loaded,) = load_task(task, None, (split,))
        docs = loaded.docs(split)
        order = range(len(docs)) if seed is None else _permutation(len(docs), seed, task, split)
        return [_render(loaded, docs[index], f"{task}/{split}/{index}") for index in order[:limit]]


def mean_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over tasks of every key that all tasks have.

    ``n`` is summed; a standard error is that of the mean of independent tasks, sqrt(sum se^2) / tasks.
    """
    rows = list(scores.values())
    mean = {}
    for key in rows[0] if rows else ():
        values = [row[key] for row in rows if key in row]
        if len(values) < len(rows):
            continue
        if key == "n":
            mean[key] = sum(values)
        elif key.endswith("_stderr"):
            mean[key] = math.sqrt(sum(value**2 for value in values)) / len(values)
        else:
            mean[key] = sum(values) / len(values)
    return mean


def _permutation(rows: int, seed: int, task: str, split: str) -> list[int]:
    return [int(i) for i in torch.randperm(rows, generator=generator(seed, "rows", task, split))]


def _render(task: LoadedTask, doc: dict[str, Any], key: str) -> Row:
    gold = task.gold(doc)
    if gold is None:
        raise EvaluationError(f"row {key} has no single gold choice; remove it or use another task")
    prompt, target = task.requests(doc)[gold]
    return Row(prompt=prompt, target=target, source=task.name, key=key, label=gold)


def _question_samples(
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


def _missing_stderrs(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the standard error of accuracies where lm-eval gave none because another metric would need a bootstrap.

    The formula is lm-eval's own: sample standard deviation over the square root of the number of questions.
    """
    found = {}
    for metric in ("acc", "acc_norm"):
        values = torch.tensor([float(sample[metric]) for sample in samples if metric in sample], dtype=torch.float64)
        if results.get(f"{metric}_stderr,none") == "N/A" and len(values) > 1:
            found[f"{metric}_stderr,none"] = float(values.std()) / math.sqrt(len(values))
    return found


def _task_scores(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return lm-eval's numbers for one task, and ours from the same log-likelihoods."""
    scores: dict[str, float] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, (int, float)) and not isinstance(value, bool):
            scores[metric if kind == "none" else f"{metric}:{kind}"] = float(value)
    scores["n"] = len(samples)
    if samples and all("gold" in sample for sample in samples):
        scores |= score_answers([(s["loglikelihoods"], s["gold"], s["answer_tokens"]) for s in samples])
    return scores


def _plain_results(raw: dict[str, Any], settings: dict[str, Any], tasks: Mapping[str, LoadedTask]) -> dict[str, Any]:
    """Return lm-eval's results as plain JSON values, free of this machine's paths."""
    import lm_eval
    import transformers
    from lm_eval.utils import handle_non_serializable

    raw = {**raw, "config": settings, "date": time.time()}
    raw |= {"lm_eval_version": lm_eval.__version__, "transformers_version": transformers.__version__}
    raw["configs"] = {name: tasks[name].public_config(config) for name, config in raw["configs"].items()}
    plain: dict[str, Any] = json.loads(json.dumps(raw, default=handle_non_serializable))
    return plain


@contextlib.contextmanager
def _bar(progress: bool | Progress) -> Iterator[Progress | None]:
    """Yield the function to report progress to: the given one, a bar's, or None."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating")
        yield lambda done, total: bar.update(task, completed=done, total=total)

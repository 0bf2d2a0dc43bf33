"""lm-eval in process: scores a model, and checks what a recipe asks for.

lm-eval is imported when it is first needed, so that importing this module stays cheap. Prompts, targets and metrics are
always lm-eval's own; for the tasks of :func:`task_names` the documents come from the local cache.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedproxy.console import progress_console
from fedproxy.evaluation.chat import PLAIN, ChatFormat
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.evaluation.offline_tasks import Split, missing_assets, task_names
from fedproxy.evaluation.prompt_limits import positions, prompt_limits
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.results import (
    EvaluationResult,
    missing_stderrs,
    no_numbers,
    plain_results,
    question_samples,
    task_scores,
)
from fedproxy.evaluation.task_checks import (
    check_metrics,
    check_settings,
    check_task,
)
from fedproxy.evaluation.task_loading import expand, load_task, needed_splits
from fedproxy.models.modes import evaluating
from fedproxy.task_means import mean_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "METRICS",
    "EvaluationResult",
    "check_tasks",
    "evaluate_model",
    "missing_assets",
    "prompt_notes",
    "task_names",
]

METRICS = ("acc", "acc_norm", "answer_nll", "answer_nll_total", "margin", "ece")
"""Names of a multiple-choice task's scores; each but ``ece`` and ``answer_nll`` is a mean over questions."""

Progress = Callable[[int, int], None]
"""Called with (requests done, requests in all)."""


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
    autocast: torch.dtype | None = None,
    chat: ChatFormat = PLAIN,
    progress: bool | Progress = False,
) -> EvaluationResult:
    """Score a causal language model on lm-eval tasks.

    Args:
        model: The model, on its device; its weights are not changed and its modules' modes are restored.
        tokenizer: Its tokenizer.
        tasks: Task names: those of :func:`task_names` run on local files, task files of one's own on theirs, any other
            through the hub; a tag stands for its tasks.
        limit: Only the first ``limit`` documents of each task; None is all.
        num_fewshot: Solved examples before each question, drawn from the train split with ``seed``.
        batch_size: Sequences per forward where requests do not share prefixes (generation, fallback).
        batch_tokens: Tokens per forward where they do.
        seed: Seed of the few-shot sampler.
        split: Score on ``test`` or ``validation``; None is lm-eval's choice (test where there is one).
        autocast: Dtype of the matrix products before the head; None is the weights' own.
        chat: How a question becomes a prompt.
        progress: True shows a bar, a function is called with (done, total).

    Raises:
        EvaluationError: If a task is unknown or has no data, or a setting does not fit it.
    """
    from lm_eval.evaluator import evaluate

    from fedproxy.evaluation.prefix_sharing import PrefixSharingLM

    check_tasks(tasks, limit=limit, num_fewshot=num_fewshot, split=split)
    chat.check(tokenizer)
    start = time.perf_counter()
    loaded = {task.name: task for task in _loaded(tasks, split, num_fewshot)}
    asked = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed}
    with quiet(), evaluating(model), _bar(progress) as report:
        sizes = {"batch_size": batch_size, "batch_tokens": batch_tokens}
        lm = PrefixSharingLM(model, tokenizer, **sizes, autocast=autocast, on_progress=report)
        notes = [note for task in loaded.values() for note in _prepare(task, tokenizer, lm, asked, chat)]
        raw = evaluate(
            lm=lm,
            task_dict={"tasks": {name: task.task for name, task in loaded.items()}},
            limit=limit,
            **chat.options(),
            bootstrap_iters=1 if all(task.only_means for task in loaded.values()) else 0,
        )
    return _result(raw, loaded, lm, {**asked, "split": split, **chat.noted()}, notes, time.perf_counter() - start)


def _prepare(
    task: LoadedTask, tokenizer: "PreTrainedTokenizerBase", lm: Any, asked: dict[str, Any], chat: ChatFormat
) -> tuple[str, ...]:
    """Set a task's solved examples and its longest answer, and return what a model has no room for."""
    limits = prompt_limits(task, tokenizer, lm.max_length, **asked, chat=chat)
    task.prepare(asked["num_fewshot"], asked["seed"], limits.answer_tokens)
    return limits.notes


def _result(
    raw: dict[str, Any],
    loaded: Mapping[str, LoadedTask],
    lm: Any,
    settings: dict[str, Any],
    notes: list[str],
    seconds: float,
) -> EvaluationResult:
    """Return what lm-eval found, with scores of ours."""
    if lm.obstacle is not None:
        notes.append(f"Every sequence is run alone, as lm-eval does it: {lm.obstacle}.")
    settings |= {"sharing": lm.sharing}
    logged = raw.pop("samples")
    samples = {name: question_samples(task, logged[name], lm.answer_tokens) for name, task in loaded.items()}
    notes += [note for own in samples.values() for note in no_numbers(own)]
    for name, results in raw["results"].items():
        results |= missing_stderrs(results, samples[name])
    scores = {name: task_scores(raw["results"][name], samples[name]) for name in loaded}
    return EvaluationResult(
        scores=scores,
        mean=mean_scores(scores),
        samples=[sample for name in loaded for sample in samples[name]],
        lm_eval=plain_results(raw, settings, loaded),
        seconds=seconds,
        notes=notes,
    )


def prompt_notes(
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
    split: Split | None = None,
    chat: ChatFormat = PLAIN,
) -> list[str]:
    """Return what an evaluation will have to cut, in a sentence each, from a model's configuration alone.

    Raises:
        EvaluationError: If a task cannot be asked of such a model.
    """
    chat.check(tokenizer)
    with quiet():
        most = positions(config, tokenizer)
        return [
            note
            for task in _loaded(tasks, split, num_fewshot)
            for note in prompt_limits(
                task, tokenizer, most, limit=limit, num_fewshot=num_fewshot, seed=seed, chat=chat
            ).notes
        ]


def _loaded(tasks: Sequence[str], split: Split | None, num_fewshot: int) -> list[LoadedTask]:
    return [task for name in expand(tasks) for task in load_task(name, split, needed_splits(name, split, num_fewshot))]


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
    single = expand(names)
    check_settings(single, limit, num_fewshot, split)
    for name in single:
        check_task(name, limit, num_fewshot, split)


@contextlib.contextmanager
def _bar(progress: bool | Progress) -> Iterator[Progress | None]:
    """Yield the function to report progress to: the given one, a bar's, or None."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    from rich.progress import Progress as Bar

    with Bar(console=progress_console(), transient=True) as bar:
        task = bar.add_task("evaluating")
        yield lambda done, total: bar.update(task, completed=done, total=total)

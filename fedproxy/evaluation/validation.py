"""Scores a model on training rows that no client owns, so that rounds can be compared without the scored split."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedproxy.data.rows import Row
from fedproxy.errors import DataError
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_loading import load_one, needed_splits
from fedproxy.models.modes import evaluating
from fedproxy.seeding import generator
from fedproxy.task_means import mean_scores

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACCURACIES = ("acc", "acc_norm")
_BATCH_TOKENS = 2048
"""Tokens per forward: a constant, as the batches decide the last bits of a score and the scores decide a round."""


@dataclass(frozen=True)
class Question:
    """A held-out row: what is asked of the model, and how its log-likelihoods are judged."""

    source: str
    """Task or file that the row is from."""
    key: str
    """The row's key; see :class:`fedproxy.data.rows.Row`."""
    requests: tuple[tuple[str, str], ...]
    """(context, continuation) of every choice; of the answer alone where the source has no choices."""
    gold: int
    """Index of the right choice."""
    accuracies: tuple[str, ...] = ()
    """Which of ``acc`` and ``acc_norm`` the source has."""
    judge: Callable[[Sequence[float]], Mapping[str, float]] = lambda loglikelihoods: {}
    """Gives those from the log-likelihood of every choice."""


def task_questions(task: str, rows: int, owned: Collection[Row], seed: int) -> list[Question]:
    """Return ``rows`` questions of a task's train split that are not among ``owned``, drawn by seed.

    A row counts as owned if its key or its text is: train splits hold some questions twice. Neither is a question asked
    that the scored split asks too: official splits share a few.

    Raises:
        DataError: If fewer are left.
        EvaluationError: If the task has no local train split, or is not multiple choice.
    """
    keys, texts = {row.key for row in owned}, {(row.prompt, row.target) for row in owned}
    split = needed_splits(task, None, 0)[0]
    with quiet():
        loaded = load_one(task, None, ("train", split))
        loaded.check_rows("train")
        docs = loaded.docs("train")
        left = len(docs) - sum(row.source == loaded.name for row in owned)
        if left < rows:  # told before every row is rendered
            raise too_few(task, rows, left)
        scored = {context for doc in loaded.docs(loaded.scored) for context, _ in loaded.requests(doc)}
        found: list[Question] = []
        for index in _order(len(docs), seed, loaded.name):
            row = loaded.row(docs[index], "train", index)
            if row.key not in keys and (row.prompt, row.target) not in texts and row.prompt not in scored:
                found.append(_question(loaded, docs[index], row))
            if len(found) == rows:
                return found
    raise too_few(task, rows, len(found))


def row_questions(
    source: str, candidates: Sequence[Row], rows: int, owned: Collection[Row], seed: int
) -> list[Question]:
    """Return ``rows`` questions without choices from the rows of a file that are not among ``owned``.

    Raises:
        DataError: If fewer are left.
    """
    keys, texts = {row.key for row in owned}, {(row.prompt, row.target) for row in owned}
    order = (candidates[index] for index in _order(len(candidates), seed, source))
    left = [row for row in order if row.key not in keys and (row.prompt, row.target) not in texts]
    if len(left) < rows:
        raise too_few(source, rows, len(left))
    return [Question(source, row.key, ((row.prompt, row.target),), 0) for row in left[:rows]]


def too_few(source: str, wanted: int, left: int) -> DataError:
    """Return the error of a source that has too few rows without an owner."""
    return DataError(
        f"federation.validation.rows is {wanted}, but clients leave {left} training rows of {source!r} without an "
        f"owner; lower it, or lower data.rows_per_task"
    )


def score_questions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    autocast: "torch.dtype | None" = None,
) -> dict[str, dict[str, float | None]]:
    """Score a model in memory, zero-shot; its weights and its training mode are left as they were.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        questions: What is asked.
        autocast: Dtype of the matrix products before the head; None is the weights' own.

    Returns:
        Source, and ``mean``, to: ``acc`` and ``acc_norm`` with standard errors where the source has them, by lm-eval's
        definitions; ``answer_nll``, nats per token of the right answers (sum over questions / sum of tokens); ``n``.
    """
    from lm_eval.api.instance import Instance

    from fedproxy.evaluation.prefix_sharing import PrefixSharingLM

    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=request, idx=number)
        for question in questions
        for number, request in enumerate(question.requests)
    ]
    with quiet(), evaluating(model):
        lm = PrefixSharingLM(model, tokenizer, batch_tokens=_BATCH_TOKENS, autocast=autocast)
        answers = iter(lm.loglikelihood(asked, disable_tqdm=True))
    by_source: dict[str, list[tuple[Question, list[float]]]] = {}
    for question in questions:
        values = [float(next(answers)[0]) for _ in question.requests]
        by_source.setdefault(question.source, []).append((question, values))
    scores = {source: _scores(found, lm.answer_tokens) for source, found in by_source.items()}
    return {**scores, "mean": mean_scores(scores)}


def _scores(
    answered: Sequence[tuple[Question, list[float]]], answer_tokens: Mapping[tuple[str, str], int]
) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    judged = [question.judge(values) for question, values in answered]
    for name in answered[0][0].accuracies:
        right = [float(found[name]) for found in judged]
        scores[name] = statistics.fmean(right)
        if len(right) > 1:
            scores[f"{name}_stderr"] = statistics.stdev(right) / math.sqrt(len(right))
    nll = -math.fsum(values[question.gold] for question, values in answered)
    scores["answer_nll"] = nll / sum(answer_tokens[question.requests[question.gold]] for question, _ in answered)
    scores["n"] = len(answered)
    return scores


def _question(task: LoadedTask, doc: dict[str, Any], row: Row) -> Question:
    def judge(loglikelihoods: Sequence[float]) -> Mapping[str, float]:
        found: Mapping[str, float] = task.task.process_results(doc, [(value, False) for value in loglikelihoods])
        return found

    assert isinstance(row.label, int)  # a row of a task has its gold choice
    accuracies = tuple(name for name in ACCURACIES if name in task.task.aggregation())
    return Question(task.name, row.key, tuple(task.requests(doc)), row.label, accuracies, judge)


def _order(rows: int, seed: int, source: str) -> list[int]:
    import torch

    return [int(i) for i in torch.randperm(rows, generator=generator(seed, "validation", source))]

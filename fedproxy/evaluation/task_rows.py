"""Training rows of lm-eval tasks, rendered by the task of the same name: no model and no scoring is needed for them."""

from collections.abc import Sequence

import torch

from fedproxy.data.rows import Row
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_checks import check_rows, check_training_task
from fedproxy.evaluation.task_loading import expand, load_one
from fedproxy.seeding import generator


def check_data_tasks(names: Sequence[str]) -> None:
    """Raise one clear line unless clients can own training rows of every task; local tasks are not loaded.

    Raises:
        EvaluationError: If a task is unknown, has no train split, or is not multiple choice.
    """
    for name in expand(names):
        check_training_task(name)


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
        loaded = load_one(task, None, (split,))
        loaded.check_rows(split)
        docs = loaded.docs(split)
        order = range(len(docs)) if seed is None else _permutation(len(docs), seed, loaded.name, split)
        return [loaded.row(docs[index], split, index) for index in order[:limit]]


def _permutation(rows: int, seed: int, task: str, split: str) -> list[int]:
    return [int(i) for i in torch.randperm(rows, generator=generator(seed, "rows", task, split))]

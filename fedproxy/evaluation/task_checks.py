"""What evaluation settings must satisfy; each broken rule is told in one line before a model is loaded."""

from collections.abc import Sequence

from fedproxy.errors import EvaluationError, nearest
from fedproxy.evaluation.offline_tasks import Split, count_rows, offline_tasks, task_names
from fedproxy.evaluation.task_loading import load_one, load_task, needed_splits

_SPLITS = ("test", "validation")


def check_settings(names: Sequence[str], limit: int | None, num_fewshot: int, split: str | None) -> None:
    """Raise an EvaluationError unless the settings make sense whatever the task."""
    if not names:
        raise EvaluationError(f"evaluation.tasks is empty; name at least one of {', '.join(task_names())}")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise EvaluationError(f"evaluation.tasks names {repeated[0]!r} twice; name each task once")
    if limit is not None and limit < 1:
        raise EvaluationError(f"evaluation.limit must be at least 1 or null for all questions, got {limit}")
    if num_fewshot < 0:
        raise EvaluationError(f"evaluation.num_fewshot must be at least 0, got {num_fewshot}")
    if split is not None and split not in _SPLITS:
        raise EvaluationError(f"evaluation.split must be test, validation or null, got {split!r}")


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Raise an EvaluationError for a metric that is not one of ``known``."""
    for metric in metrics:
        if metric not in known:
            raise EvaluationError(f"unknown metric {metric!r}{nearest(metric, known)}")


def check_task(name: str, limit: int | None, num_fewshot: int, split: Split | None) -> None:
    """Raise an EvaluationError unless the task exists, has data, and has as much of it as is asked for.

    A task with local files is not loaded, its rows are only counted; any other is loaded through the hub.
    """
    needs = needed_splits(name, split, num_fewshot)
    task = offline_tasks().get(name)
    known = not num_fewshot or "train" in needs
    if task is not None and task.has(needs) and known:
        rows = {part: count_rows(path) for part in needs if (path := task.file(part)) is not None}
        # lm-eval draws one more where it leaves the question out, as it does without a test split.
        examples = rows["train"] - int(needs[0] == "validation") if num_fewshot else None
        _check_counts(name, rows[needs[0]], examples, limit, num_fewshot)
        return
    for loaded in load_task(name, split, needs):
        examples = loaded.examples if loaded.shots(num_fewshot) else None
        _check_counts(loaded.name, len(loaded.task.eval_docs), examples, limit, num_fewshot)


def check_training_task(name: str) -> None:
    """Raise an EvaluationError unless clients can own rows of the task: it is multiple choice and has a train split."""
    task = offline_tasks().get(name)
    if task is None or not task.multiple_choice or not task.has(("train",)):
        load_one(name, None, ("train",)).check_rows("train")


def headlines(name: str) -> set[str]:
    """Return the metrics of a task by which methods can be compared; one without a file of ours is loaded for it.

    Raises:
        EvaluationError: If it is unknown or cannot be loaded.
    """
    task = offline_tasks().get(name)
    if task is not None and task.multiple_choice:
        return {"acc", "answer_nll"}
    return set.intersection(*(loaded.headlines for loaded in load_task(name, None, needed_splits(name, None, 0))))


def check_rows(name: str, split: str, limit: int | None) -> None:
    """Raise an EvaluationError unless rows of the split can be asked for."""
    if split not in ("train", *_SPLITS):
        raise EvaluationError(f"task {name!r}: split must be train, validation or test, got {split!r}")
    if limit is not None and limit < 1:
        raise EvaluationError(f"task {name!r}: the number of rows must be at least 1, got {limit}")


def _check_counts(name: str, questions: int, examples: int | None, limit: int | None, num_fewshot: int) -> None:
    if limit is not None and limit > questions:
        raise EvaluationError(f"evaluation.limit {limit} is above the {questions} questions of {name}; lower it")
    if examples is not None and num_fewshot > examples:
        raise EvaluationError(
            f"evaluation.num_fewshot {num_fewshot} is above the {examples} examples of {name}; lower it"
        )

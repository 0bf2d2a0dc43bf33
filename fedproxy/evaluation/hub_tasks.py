"""Tasks without local files: lm-eval's own, with data from the hub or from the hub client's cache."""

import difflib
import functools
from typing import Any

from fedproxy.errors import EvaluationError, first_line, nearest
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.evaluation.offline_tasks import Split, offline_tasks, task_names
from fedproxy.evaluation.quiet import quiet
from fedproxy.model_hub import hub_or_its_cache, hub_says

_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
"""Keys of a group that change nothing about its tasks."""


@functools.lru_cache(maxsize=256)
def load_from_hub(name: str, split: Split | None) -> list[LoadedTask]:
    """Return the task, or the tasks of the group, that lm-eval knows by this name.

    Raises:
        EvaluationError: If there is none, its data cannot be had, or it lacks the split.
    """
    _require_known(name)
    try:
        with quiet(), hub_or_its_cache():
            tasks = hub_manager().load([name])["tasks"]
    except Exception as error:  # datasets, the hub client and lm-eval raise many kinds
        raise EvaluationError(
            f"task {name!r} has no local data and could not be loaded from the hub "
            f"({hub_says(error) or first_line(error)}); "
            f"tasks with local data: {', '.join(_with_data()) or 'none; run python -m fedproxy.assets fetch qa'}"
        ) from error
    return [LoadedTask(task, split) for task in tasks.values()]


def members(name: str) -> list[str]:
    """Return the tasks that a tag of lm-eval, or a group that only lists names, stands for; else the name itself.

    Raises:
        EvaluationError: If lm-eval knows no such name.
    """
    _require_known(name)
    entry = hub_manager().task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(listed, list) or not set(entry.cfg) <= _GROUP_KEYS:
        return [name]
    if not all(isinstance(part, str) for part in listed):
        return [name]
    return [task for part in listed for task in ([part] if part in offline_tasks() else members(part))]


def _require_known(name: str) -> None:
    known = hub_manager().all_tasks
    if name not in known:
        close = difflib.get_close_matches(name, [*task_names(), *known], n=1)
        raise EvaluationError(f"unknown task {name!r}{nearest(name, close or task_names())}")


@functools.cache
def hub_manager() -> Any:
    """Return lm-eval's index of all its tasks; building it takes several seconds."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _with_data() -> list[str]:
    return [name for name, task in offline_tasks().items() if task.has((task.scored_split(None),))]

"""Tasks without local files: lm-eval's own, with data from the hub or from the hub client's cache."""

import contextlib
import difflib
import functools
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from fedproxy.errors import EvaluationError, first_line, nearest
from fedproxy.evaluation.loaded_task import LoadedTask, Split
from fedproxy.evaluation.offline_tasks import offline_tasks, task_names
from fedproxy.evaluation.quiet import quiet


@functools.lru_cache(maxsize=32)
def load_from_hub(name: str, split: Split | None) -> list[LoadedTask]:
    """Return the task, or the tasks of the group or tag, that lm-eval knows by this name.

    Raises:
        EvaluationError: If there is none, its data cannot be had, or it lacks the split.
    """
    manager = hub_manager()
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, [*task_names(), *manager.all_tasks], n=1)
        raise EvaluationError(f"unknown task {name!r}{nearest(name, close or task_names())}")
    with quiet(), _hub_or_its_cache():
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # datasets, the hub client and lm-eval raise many kinds
            raise EvaluationError(
                f"task {name!r} has no local data and could not be loaded from the hub ({first_line(error)}); "
                f"tasks with local data: {', '.join(_with_data()) or 'none; run python -m fedproxy.assets fetch qa'}"
            ) from error
    return [LoadedTask(task, None, split) for task in tasks.values()]


@functools.cache
def hub_manager() -> Any:
    """Return lm-eval's index of all its tasks; building it takes several seconds."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _with_data() -> list[str]:
    return [name for name, task in offline_tasks().items() if task.has((task.scored_split(None),))]


@contextlib.contextmanager
def _hub_or_its_cache() -> Iterator[None]:
    """Where the hub does not answer, let its clients look into their caches only, without minutes of retries."""
    import datasets.config
    import huggingface_hub.constants

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    if not any(before) and not _answers(huggingface_hub.constants.ENDPOINT):
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _answers(address: str) -> bool:
    """Tell whether a server answers within five seconds."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True

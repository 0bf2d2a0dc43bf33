"""Turns a task name into lm-eval's task object: a file of one's own, local data where we have them, else the hub."""

import functools
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from fedproxy.data.assets import cache_root
from fedproxy.errors import EvaluationError, first_line, one_line
from fedproxy.evaluation.hub_tasks import load_from_hub, members
from fedproxy.evaluation.loaded_task import LoadedTask
from fedproxy.evaluation.offline_tasks import OfflineTask, Split, offline_tasks
from fedproxy.evaluation.own_tasks import is_task_file, load_own, own_scored_files
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_folders import named_files


def needed_splits(name: str, split: Split | None, num_fewshot: int) -> tuple[str, ...]:
    """Return the splits that an evaluation reads: the scored one first, then train for solved examples.

    A task of ours that declares no train split draws them elsewhere.
    """
    offline = offline_tasks().get(name)
    scored = offline.scored_split(split) if offline else split or "test"
    return (scored, "train") if num_fewshot and (offline is None or "train" in offline.declared) else (scored,)


def expand(names: Iterable[str], include_path: str | None = None) -> list[str]:
    """Return the names with every tag of lm-eval, and every group that only lists names, replaced by its tasks.

    Args:
        names: Names of tasks, tags, groups and task files.
        include_path: Folder of task files, whose names come first; None is none.

    Raises:
        EvaluationError: If lm-eval knows none of that name, or the folder cannot be used.
    """
    own = {} if include_path is None else named_files(include_path)
    return [task for name in names for task in own.get(name) or _single(name)]


def _single(name: str) -> list[str]:
    return [name] if name in offline_tasks() or is_task_file(name) else members(name)


def scored_files(name: str) -> list[Path]:
    """Return the local files of the questions that a task asks; none where it has its data from the hub.

    Raises:
        EvaluationError: If it is a file that cannot be used.
    """
    if is_task_file(name):
        return own_scored_files(name)
    task = offline_tasks().get(name)
    file = None if task is None else task.file(task.scored_split(None))
    return [] if file is None else [file]


def load_one(name: str, split: Split | None, needs: Iterable[str]) -> LoadedTask:
    """Return the task of that name, as :func:`load_task` does.

    Raises:
        EvaluationError: As there, or if the name stands for several tasks.
    """
    listed = expand([name])
    found = load_task(listed[0], split, needs) if len(listed) == 1 else []
    if len(found) != 1:
        several = [task.name for task in found] or listed
        raise EvaluationError(f"{name!r} stands for {len(several)} tasks: {one_line(', '.join(several))}; name one")
    return found[0]


def load_task(name: str, split: Split | None, needs: Iterable[str]) -> list[LoadedTask]:
    """Return the lm-eval task of that name, or the tasks of a group of the hub.

    Args:
        name: Task name, or a task file of one's own; through the hub also a group.
        split: Score on this split; None is lm-eval's choice.
        needs: Splits that will be read (``train``, ``validation``, ``test``): the local files are used if they have
            all of them, else the hub.

    Raises:
        EvaluationError: If the task is unknown, cannot be loaded, or lacks a split.
    """
    if is_task_file(name):
        return [load_own(name, split)]
    offline, needs = offline_tasks().get(name), tuple(needs)
    if offline is not None and offline.has(needs):
        text = yaml.safe_dump(offline.resolved(), sort_keys=False)
        files = [cache_root() / file for file in offline.declared.values()]
        stamp = tuple(path.stat().st_mtime_ns for path in files if path.is_file())
        return [_load_offline(offline, text, stamp, split)]
    if offline is None:
        return load_from_hub(name, split)
    _require_hub(offline, needs)
    return load_from_hub(name, offline.scored_split(split))


def _require_hub(task: OfflineTask, needs: Sequence[str]) -> None:
    """Raise an EvaluationError if the hub cannot have what the local files of a task lack."""
    declared = {split.partition("_")[0] for split in task.declared}
    for split in needs:
        if split not in declared:
            raise EvaluationError(
                f"task {task.name!r} has no {split} split; choose one of {', '.join(sorted(declared))}"
            )
    if task.own or hub_is_off():
        raise EvaluationError(
            f"task {task.name!r} has no local {' and '.join(needs)} data under {cache_root() / task.asset}; "
            f"run python -m fedproxy.assets fetch {task.asset}, or allow the hub if the asset lacks them"
        )


def hub_is_off() -> bool:
    """Tell whether the environment forbids the hub (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


@functools.lru_cache(maxsize=32)
def _load_offline(offline: OfflineTask, text: str, stamp: tuple[int, ...], split: Split | None) -> LoadedTask:
    """Load a task file of ours; ``text`` and ``stamp`` make a changed file or cache folder a new entry."""
    from lm_eval.tasks import TaskManager

    with quiet(), tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{offline.name}.yaml").write_text(text, encoding="utf-8")
        try:
            tasks = TaskManager(include_path=folder, include_defaults=False).load([offline.name])["tasks"]
        except Exception as error:  # whatever lm-eval or datasets raise on a broken file
            raise EvaluationError(
                f"task {offline.name!r} cannot be read from {cache_root() / offline.asset} ({first_line(error)}); "
                f"fetch its data again"
            ) from error
    public = {"dataset_kwargs": offline.config["dataset_kwargs"], "config_source": f"fedproxy/{offline.name}.yaml"}
    return LoadedTask(tasks[offline.name], split, public)

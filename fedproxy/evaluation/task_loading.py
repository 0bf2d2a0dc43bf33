"""Turns a task name into lm-eval's task object, from local files where we have them and through the hub otherwise."""

import contextlib
import difflib
import functools
import logging
import os
import random
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fedproxy.data.assets import cache_root
from fedproxy.errors import EvaluationError, nearest
from fedproxy.evaluation.offline_tasks import OfflineTask, offline_tasks, task_names

Split = Literal["test", "validation"]


class LoadedTask:
    """One lm-eval task and what it was configured with."""

    def __init__(self, task: Any, offline: OfflineTask | None) -> None:
        self.task, self.offline = task, offline
        self.name: str = task.get_config("task")
        self._num_fewshot: int | None = task.get_config("num_fewshot")

    @property
    def multiple_choice(self) -> bool:
        """Whether every document is a question with choices that are scored by log-likelihood."""
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")

    @property
    def only_means(self) -> bool:
        """Whether every metric is a mean, whose standard error needs no bootstrap."""
        return all(getattr(function, "__name__", "") == "mean" for function in self.task.aggregation().values())

    def prepare(self, num_fewshot: int, seed: int) -> None:
        """Set the number of solved examples (a task that fixes it at 0 keeps 0, as in lm-eval) and their seed."""
        self.task.set_config(key="num_fewshot", value=0 if self._num_fewshot == 0 else num_fewshot)
        self.task.set_fewshot_seed(seed=seed)

    def docs(self, split: str) -> Any:
        """Return the documents of ``train``, ``validation`` or ``test`` as an indexable data set, or None."""
        docs = {"train": "training_docs", "validation": "validation_docs", "test": "test_docs"}[split]
        return getattr(self.task, docs)()

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """Return lm-eval's zero-shot (context, continuation) of every choice of a document."""
        context = self.task.fewshot_context(doc, 0, gen_prefix=self.task.doc_to_prefix(doc))
        instances = self.task.construct_requests(doc=doc, ctx=context, metadata=(self.name, 0, 1))
        choices = len(self.task.doc_to_choice(doc))
        return [(instance.args[0], instance.args[1]) for instance in instances[:choices]]

    def gold(self, doc: dict[str, Any]) -> int | None:
        """Return the index of the gold choice, by lm-eval's rule, or None where there is not exactly one."""
        gold = self.task.doc_to_text(doc) if self.task.multiple_input else self.task.doc_to_target(doc)
        choices = self.task.doc_to_choice(doc)
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else None
        return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None

    def public_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return lm-eval's dump of the task's configuration without this machine's paths."""
        if self.offline is None:
            return config
        metadata = {**(config.get("metadata") or {}), "config_source": f"fedproxy/{self.name}.yaml"}
        return {**config, "dataset_kwargs": self.offline.config["dataset_kwargs"], "metadata": metadata}


def needed_splits(name: str, split: Split | None, num_fewshot: int) -> tuple[str, ...]:
    """Return the splits that an evaluation reads: the scored one first, then train for solved examples."""
    offline = offline_tasks().get(name)
    scored = offline.scored_split(split) if offline else split or "test"
    return (scored, "train") if num_fewshot else (scored,)


def load_task(name: str, split: Split | None, needs: Iterable[str]) -> list[LoadedTask]:
    """Return the lm-eval task of that name, or the tasks of a group of the hub.

    Args:
        name: Task name; through the hub also a group or tag.
        split: Score on this split; None is lm-eval's choice.
        needs: Splits that will be read (``train``, ``validation``, ``test``): the local files are used if they have
            all of them, else the hub.

    Raises:
        EvaluationError: If the task is unknown, cannot be loaded, or lacks a split.
    """
    offline, needs = offline_tasks().get(name), tuple(needs)
    if offline is not None and offline.has(needs):
        text = yaml.safe_dump(offline.resolved(), sort_keys=False)
        files = [cache_root() / file for file in offline.declared.values()]
        stamp = tuple(path.stat().st_mtime_ns for path in files if path.is_file())
        return [_load_offline(offline, text, stamp, split)]
    if offline is not None:
        _require_hub(offline, needs)
    return _load_from_hub(name, split)


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


class _NoProgress:
    """Stands in for tqdm inside lm-eval: iterates, counts nothing and prints nothing."""

    def __init__(self, iterable: Any = (), *_: Any, **__: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, n: int = 1) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from printing bars and notes, and from advancing Python's random generator."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    state, level, originals = random.getstate(), logger.level, [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = _NoProgress
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.tqdm = original
        if bars:
            datasets.enable_progress_bars()
        logger.setLevel(level)
        random.setstate(state)


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
                f"task {offline.name!r} cannot be read from {cache_root() / offline.asset} ({_line(error)}); "
                f"fetch its data again"
            ) from error
    return LoadedTask(_with_split(tasks[offline.name], split), offline)


@functools.lru_cache(maxsize=32)
def _load_from_hub(name: str, split: Split | None) -> list[LoadedTask]:
    manager = hub_manager()
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, [*task_names(), *manager.all_tasks], n=1)
        raise EvaluationError(f"unknown task {name!r}{nearest(name, close or task_names())}")
    with quiet(), _hub_or_its_cache():
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # datasets, the hub client and lm-eval raise many kinds
            raise EvaluationError(
                f"task {name!r} has no local data and could not be loaded from the hub ({_line(error)}); "
                f"tasks with local data: {', '.join(_with_data()) or 'none; run python -m fedproxy.assets fetch qa'}"
            ) from error
    return [LoadedTask(_with_split(task, split), None) for task in tasks.values()]


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


def _with_split(task: Any, split: Split | None) -> Any:
    """Make the task score on ``split``."""
    if split is None:
        return task
    if not (task.has_test_docs() if split == "test" else task.has_validation_docs()):
        raise EvaluationError(f"task {task.get_config('task')!r} has no {split} split; leave evaluation.split null")
    if split == "validation":
        task.set_config(key="test_split", value=None)
    return task


def _line(error: BaseException) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."

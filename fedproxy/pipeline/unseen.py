"""What models are scored on is nothing that clients train on: compared by files, bytes, and sets of equal rows."""

import filecmp
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedproxy.config import DataConfig, RunConfig
from fedproxy.data.assets.store import cache_root
from fedproxy.data.sources import files_of
from fedproxy.errors import ConfigError
from fedproxy.evaluation.task_loading import scored_files

_SHARED = {
    "chat-qa/drop": "open-qa/drop",
    "chat-qa/gsm8k": "open-qa/gsm8k",
    "chat-qa/nq_open": "open-qa/nq_open",
    "chat-qa/squad": "open-qa/squad",
    "chat-qa/trivia_qa": "open-qa/triviaqa",
}
"""Sets that are made of the same rows: folders of the cache."""


def files_trained_on(config: DataConfig) -> dict[Path, str]:
    """Return every real file that ``data.files`` are read from, and the name of its source.

    Raises:
        DataError: If there is no such file.
        AssetError: If an asset is unknown or cannot be fetched.
    """
    return {file: name for name, path in config.files.items() for file in files_of(path)}


def check_unseen_file(name: str, path: str, trained: Mapping[Path, str]) -> None:
    """Refuse held-out rows of a file that clients train on.

    Args:
        name: Its name in ``evaluation.files``.
        path: Where it lies.
        trained: Files that clients train on, and their names.

    Raises:
        ConfigError: Naming both.
        DataError: If there is no such file.
        AssetError: If an asset is unknown or cannot be fetched.
    """
    other = _trained(files_of(path), trained)
    if other is not None:
        raise ConfigError(
            f"evaluation.files.{name} is data.files.{other} or a copy of it, which clients train on; give rows that "
            "nobody does"
        )


def check_unseen_tasks(config: RunConfig) -> None:
    """Refuse tasks whose questions clients train on.

    Raises:
        ConfigError: Naming the first one.
        DataError: If a file of rows is missing.
        AssetError: If an asset is unknown or cannot be fetched.
        EvaluationError: If a task file cannot be used.
    """
    trained = files_trained_on(config.data)
    for task in config.scored_tasks if trained else ():
        other = _trained({file.resolve() for file in scored_files(task)}, trained)
        if other is not None:
            raise ConfigError(
                f"evaluation.tasks: {task!r} asks what clients train on, as data.files.{other} has rows of the same "
                "set; leave one of them out, or hold rows out by data.holdout and score no task"
            )


def _trained(asked: Iterable[Path], trained: Mapping[Path, str]) -> str | None:
    """Return the name of a source that has rows of files that are asked, or None."""
    asked = list(asked)
    sets = set(map(_set, asked))
    for file, name in trained.items():
        if _partner(_set(file)) in sets or any(_same(file, other) for other in asked):
            return name
    return None


def _same(file: Path, other: Path) -> bool:
    """Return whether this is one file, or a copy of it."""
    if file == other:
        return True
    try:
        return file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False)
    except OSError:  # whoever reads its rows says so
        return False


def _set(file: Path) -> str:
    """Return the set of an asset that a file is of, a folder of the cache."""
    root = cache_root().resolve()
    return "/".join(file.relative_to(root).parts[:2]) if file.is_relative_to(root) else ""


def _partner(name: str) -> str | None:
    """Return the set that is made of the same rows as another one."""
    return _SHARED.get(name) or next((one for one, other in _SHARED.items() if other == name), None)

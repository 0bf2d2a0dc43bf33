"""What models are scored on is nothing that clients train on: compared by real files, and by sets that share rows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from fedproxy.config import DataConfig, RunConfig
from fedproxy.data.assets.store import cache_root
from fedproxy.data.sources import files_of
from fedproxy.errors import ConfigError
from fedproxy.evaluation.task_loading import scored_files

_SHARED = {
    "chat-qa": {
        "drop": "open-qa/drop",
        "gsm8k": "open-qa/gsm8k",
        "nq_open": "open-qa/nq_open",
        "squad": "open-qa/squad",
        "trivia_qa": "open-qa/triviaqa",
    }
}
"""Asset to its sets that are made of the rows of another asset's set, both folders of the cache."""


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
            f"evaluation.files.{name} is data.files.{other}, which clients train on; give rows that nobody does"
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
    asked = set(asked)
    return next((name for file, name in trained.items() if asked & {file} or _shares(file, asked)), None)


def _shares(file: Path, asked: Iterable[Path]) -> bool:
    root = cache_root().resolve()
    if not file.is_relative_to(root):
        return False
    asset, *inside = file.relative_to(root).parts
    other = _SHARED.get(asset, {}).get(inside[0] if inside else "")
    return other is not None and any(path.is_relative_to(root / other) for path in asked)

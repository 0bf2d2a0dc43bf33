"""A folder of task files of one's own (``evaluation.include_path``): which file a task, tag or group is."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedproxy.errors import EvaluationError, one_line
from fedproxy.evaluation.own_tasks import read_task_file
from fedproxy.files import at_home

_MOST_FILES = 1000
"""Most files of a folder, its subfolders included."""


def named_files(folder: str) -> dict[str, list[str]]:
    """Return, by every name that the files of a folder give, the task files that it stands for.

    A file names one task (``task``), under which tags it is found (``tag``), or a group (``group``) that lists names of
    the same folder. Files that begin with an underscore are there to be included.

    Raises:
        EvaluationError: If it is no folder, holds too many files, a file cannot be read, or two have one name.
    """
    root = at_home(folder)
    if not os.path.isdir(root):
        raise EvaluationError(f"evaluation.include_path: {one_line(folder, 120)} is no folder; correct the path")
    tasks: dict[str, str] = {}
    tags: dict[str, list[str]] = {}
    groups: dict[str, list[str]] = {}
    for path in _task_files(root):
        content = read_task_file(path)
        if "group" in content:
            _put(groups, str(content["group"]), _listed(content, path), path)
        elif isinstance(content.get("task"), str):
            _put(tasks, content["task"], str(path), path)
            tag = content.get("tag") or []
            for name in [tag] if isinstance(tag, str) else tag:
                tags.setdefault(str(name), []).append(str(path))
    plain = tags | {name: [path] for name, path in tasks.items()}
    return plain | {name: list(_members(name, groups, plain, ())) for name in groups}


def _task_files(root: Path) -> list[Path]:
    found = sorted(path for path in root.rglob("*") if path.suffix in (".yaml", ".yml") and path.name[0] not in "_.")
    if len(found) > _MOST_FILES:
        raise EvaluationError(
            f"evaluation.include_path: {root} holds {len(found)} task files, at most {_MOST_FILES} are read; name a "
            "smaller folder"
        )
    return found


def _put(into: dict[str, Any], name: str, value: Any, path: Path) -> None:
    if name in into:
        raise EvaluationError(
            f"evaluation.include_path: {path.name} names {one_line(name, 60)!r}, as another file does; rename one"
        )
    into[name] = value


def _listed(content: dict[str, Any], path: Path) -> list[str]:
    listed = content.get("task")
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise EvaluationError(f"evaluation.include_path: group {path.name} must list names under `task`")
    return listed


def _members(
    name: str, groups: dict[str, list[str]], plain: dict[str, list[str]], above: tuple[str, ...]
) -> Iterator[str]:
    if name in above:
        raise EvaluationError(f"evaluation.include_path: group {one_line(name, 60)!r} holds itself; remove it there")
    if name not in groups:
        if name not in plain:
            raise EvaluationError(
                f"evaluation.include_path: group {one_line(above[-1], 60)!r} lists {one_line(name, 60)!r}, which no "
                "file of the folder names"
            )
        yield from plain[name]
        return
    for part in groups[name]:
        yield from _members(part, groups, plain, (*above, name))

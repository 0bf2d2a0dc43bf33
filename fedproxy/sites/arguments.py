"""Words of the commands ``hub`` and ``site``: what to do, a file and what it says, and ``key=value``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedproxy.config.loading import build, parse_arguments
from fedproxy.errors import ConfigError, nearest, one_line
from fedproxy.yaml_files import read_mapping

C = TypeVar("C")


def worded(arguments: Sequence[str], command: str, verbs: Sequence[str]) -> tuple[str, Path, list[str]]:
    """Return what to do, the file, and the words that are left.

    Raises:
        ConfigError: If the first word is unknown, or no file is named.
    """
    example = f"write, for example, python -m fedproxy.{command} up {command}.yaml"
    if not arguments or arguments[0] not in verbs:
        given = f"{one_line(repr(arguments[0]), 40)} is not a word it knows" if arguments else "what to do is missing"
        hint = nearest(arguments[0], verbs) if arguments else f"; known: {', '.join(verbs)}"
        raise ConfigError(f"{command}: {given}{hint}; {example}")
    if len(arguments) < 2 or "=" in arguments[1] or not arguments[1].endswith((".yaml", ".yml")):
        raise ConfigError(f"{command} {arguments[0]} needs a .yaml file; {example}")
    return arguments[0], Path(arguments[1]), list(arguments[2:])


@dataclass(frozen=True)
class NoOptions:
    """Of commands that take none."""


def options(words: Sequence[str], cls: type[Any] = NoOptions) -> Any:
    """Return ``key=value`` words as the dataclass whose fields they name.

    Raises:
        ConfigError: Naming the first word that cannot be used.
    """
    return build(cls, parse_arguments(words, cls), "")


def read_file(path: Path, cls: type[C], kind: str) -> C:
    """Return what a hub's or a site's file says.

    Args:
        path: The file.
        cls: The dataclass that its keys are fields of.
        kind: What the file is called in errors.

    Raises:
        ConfigError: Naming file, key and rule.
    """
    values = read_mapping(path, kind)
    try:
        read: C = build(cls, values, "")
    except ConfigError as error:
        raise ConfigError(f"{kind} {path}: {error}") from None
    return read

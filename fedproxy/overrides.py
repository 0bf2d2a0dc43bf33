"""Words of a command line as they were meant: a key whose declared type is text takes its value as it was typed."""

import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import yaml

from fedproxy.errors import ConfigError, one_line
from fedproxy.registry import Component

_OPENING = {list: "[", dict: "{"}


def as_words(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested plain values as ``key=value`` words; JSON is YAML, so that every type comes back as it was.

    Args:
        node: Keys, which may be dotted, to texts, numbers, truth values, None, paths, lists and mappings of such.
        prefix: What stands in front of every key.

    Raises:
        ConfigError: If a key would end where it is not meant to, or a value is not plain.
    """
    words: list[str] = []
    for key, value in node.items():
        if not str(key) or "=" in str(key):
            shown = f"{prefix}{one_line(repr(key), 80)}"
            raise ConfigError(f"{shown}: a key must not be empty or hold a =; correct the key")
        if isinstance(value, Mapping) and value:
            words += as_words(value, f"{prefix}{key}.")
        else:
            words.append(as_word(f"{prefix}{key}", value))
    return words


def as_word(key: str, value: Any) -> str:
    """Return one key and its plain value as a word.

    Raises:
        ConfigError: If the value is not plain.
    """
    try:
        return f"{key}={json.dumps(value, default=os.fspath, ensure_ascii=False)}"
    except (TypeError, ValueError):  # no path either; or a list that holds itself
        raise ConfigError(
            f"{one_line(key, 80)} must be a text, a number, True, False, None, a path, or a list or mapping of those, "
            f"got {one_line(repr(value), 80)}"
        ) from None


def as_typed(argument: str, cls: type) -> str:
    """Return a ``key=value`` word from which YAML reads the text that was typed, where the key's type is text.

    YAML takes 2026_11_29, 1e3, 0x10 and on for numbers and a truth value; folders and files may be called so. A value
    in quotes, ``null`` where it may be null, and any other type are left to YAML.

    Args:
        argument: The word.
        cls: Dataclass whose fields the keys name.
    """
    key, _, value = argument.partition("=")
    hint, optional = _without_none(_hint(cls, key))
    if hint is str and not _is_quoted(value) and not (optional and value == "null"):
        return f"{key}={json.dumps(value, ensure_ascii=False)}"
    kind = typing.get_origin(hint)
    if typing.get_args(hint)[-1:] == (str,) and value.startswith(_OPENING.get(kind, "\0")):
        try:
            texts = yaml.load(value, yaml.BaseLoader)  # lists, mappings and texts alone
        except yaml.YAMLError:
            return argument  # whoever parses it says what is wrong
        items = texts.values() if isinstance(texts, dict) else texts
        if isinstance(texts, kind) and all(isinstance(item, str) for item in items):
            return f"{key}={json.dumps(texts, ensure_ascii=False)}"
    return argument


def _hint(cls: type, key: str) -> Any:
    """Return the declared type behind a dotted key, or None where there is none, or several."""
    hint: Any = cls
    for part in key.split("."):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
            continue
        if not is_dataclass(hint):
            return None
        members = [hint.by_name(name) for name in hint.names()] if _is_family(hint) else [hint]
        found = [hints[part] for member in members if part in (hints := typing.get_type_hints(member))]
        hint = found[0] if found and all(other == found[0] for other in found) else None
    return hint


def _is_family(hint: Any) -> typing.TypeGuard[type[Component]]:
    return isinstance(hint, type) and issubclass(hint, Component)


def _without_none(hint: Any) -> tuple[Any, bool]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    rest = [part for part in parts if part is not type(None)]
    return (rest[0], len(rest) < len(parts)) if len(rest) == 1 else (None, False)


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""

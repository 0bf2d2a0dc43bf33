"""YAML of people: plain values from a regular file of a bounded size, without tags, and one line where it is not so."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode
from yaml.constructor import ConstructorError

from fedproxy.errors import ConfigError, first_line, one_line
from fedproxy.files import read_whole

MOST_BYTES = 1 << 18
"""Largest recipe or study that is read: 256 KiB."""
MOST_VALUES = 50_000
"""Most values of a file, each counted as often as anchors repeat it."""
DEEPEST = 30
"""Most mappings and lists inside each other."""
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_NUMBERS = {
    _TAG + "int": r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+)",
    _TAG + "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)",
}
"""What is a number: 7, 0x1f, 1e-3, .inf. YAML 1.1 takes 2026_11_29, 010 and 12:30 for numbers; here they are text."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, which refuses a key that stands twice, and takes no date for a date."""

    def construct_mapping(self, node: Node, deep: bool = False) -> Any:
        """Return a mapping of different keys."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "a key must be a text or a number", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, _TAG + "timestamp", _TAG + "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """PyYAML's safe dumper, which puts into quotes what either reader would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out: no anchors."""
        return True


for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+0123456789."))


def dump_yaml(values: dict[str, Any]) -> str:
    """Return plain values as YAML that :func:`read_mapping` reads back."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """Return a file's keys and values; references to other keys stay as they are written.

    Args:
        path: The file.
        kind: What it is, for the error: ``recipe file`` or ``study file``.

    Raises:
        ConfigError: In one line, if it is not a regular file in UTF-8 of at most :data:`MOST_BYTES`, not YAML, holds
            no mapping, a tag, a key twice, or more than can be meant.
    """
    try:
        content = parse_yaml(read_whole(path, most=MOST_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _unreadable(path, kind, f"it is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise _unreadable(path, kind, reason) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{kind} {path} must hold a mapping of keys to values; write lines such as `seed: 42`")
    return {str(key): value for key, value in content.items()}


def parse_yaml(text: str) -> Any:
    """Return the plain value of a YAML text; None where it is empty.

    Raises:
        ValueError: In one line, if it is not YAML, or more than can be meant.
    """
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{one_line(error.problem or error)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(first_line(error)) from None


def _unreadable(path: Path, kind: str, reason: str) -> ConfigError:
    return ConfigError(f"{kind} {one_line(path)} cannot be read: {reason}; correct the file or give another")


def _check_events(text: str) -> None:
    """Refuse deep nesting and tags before anything is built of the text."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if depth > DEEPEST:
            raise ValueError(f"line {line}: it is nested more than {DEEPEST} deep")
        tag = getattr(event, "tag", None)
        if tag and tag not in _TAGS:
            raise ValueError(f"line {line}: the tag {one_line(tag, 60)} is not read; write a plain value")


def _count(node: Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for, those behind aliases included."""
    if isinstance(node, ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an anchor holds itself")
        return known[id(node)]
    known[id(node)] = 0
    parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
    total = 1 + sum(_count(part, known) for part in parts)
    if total > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES} values")
    known[id(node)] = total
    return total

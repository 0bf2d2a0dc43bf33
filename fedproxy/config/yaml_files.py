"""YAML of people: plain values from a regular file of a bounded size, without tags, and one line where it is not so."""

import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, Node, ScalarNode, YAMLError

from fedproxy.errors import ConfigError, first_line, one_line
from fedproxy.files import open_regular

MOST_BYTES = 1 << 20
"""Largest recipe or study that is read: 1 MiB."""
MOST_VALUES = 100_000
"""Most values of a file, each counted as often as anchors repeat it."""
DEEPEST = 30
"""Most mappings and lists inside each other."""
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


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
        with open_regular(path, follow=True) as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES} bytes")
            text = file.read(MOST_BYTES).decode("utf-8-sig")
        content = parse_yaml(text)
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
        _check_depth(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _count(node, {})
        if not isinstance(node, MappingNode):
            return yaml.safe_load(text)
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{one_line(error.problem or error)}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(first_line(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (TypeError, AttributeError, KeyError, OverflowError) as error:  # a key or number that the parser cannot make
        raise ValueError(f"it holds a key or value that cannot be read ({one_line(error)})") from None


def _unreadable(path: Path, kind: str, reason: str) -> ConfigError:
    return ConfigError(f"{kind} {path} cannot be read: {reason}; correct the file or give another")


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep (line {event.start_mark.line + 1})")
        tag = getattr(event, "tag", None)
        if tag and tag not in _TAGS:
            line = event.start_mark.line + 1
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

"""The keys of a recipe as their classes state them: for `--help`, and for docs/configuration.md."""

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedproxy.config.source import source_file
from fedproxy.registry import Component


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe that holds a plain value."""

    path: str
    """As it is written on the command line."""
    kind: str
    """What it takes, as a reader of YAML thinks of it."""
    default: str | None
    """As it is written on the command line; None where the key must be given."""
    meaning: str
    """The text under its field."""


def leaves(cls: type, prefix: str = "") -> Iterator[Key]:
    """Return every key with a plain value, of nested dataclasses too; of components none.

    Args:
        cls: A dataclass of the configuration, or a component.
        prefix: What stands before its keys, dot included.
    """
    hints, texts = typing.get_type_hints(cls), field_docs(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        kind = (typing.get_args(hint) or (hint,))[-1]  # of a component, or of a mapping of them
        if isinstance(kind, type) and issubclass(kind, Component):
            continue
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            yield Key(prefix + item.name, _kind(hint), _default(item), texts.get(item.name, ""))


def families(cls: type, prefix: str = "") -> Iterator[tuple[str, type[Component], str]]:
    """Return every node that names a component: its path, the family and the default's name."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if isinstance(hint, type) and issubclass(hint, Component):
            assert item.default_factory is not dataclasses.MISSING
            yield prefix + item.name, hint, item.default_factory().name
        elif dataclasses.is_dataclass(hint):
            yield from families(typing.cast(type, hint), f"{prefix}{item.name}.")


def mappings(cls: type, prefix: str = "") -> Iterator[tuple[str, list[type[Component]]]]:
    """Return every node that holds several components by their names: its path, and those that it may hold."""
    for name, hint in typing.get_type_hints(cls).items():
        kind = (typing.get_args(hint) or (None,))[-1]
        if isinstance(kind, type) and issubclass(kind, Component):
            members = (kind.by_name(member) for member in kind.names())
            yield prefix + name, [member for member in members if getattr(member, "optional", True)]
        elif dataclasses.is_dataclass(hint):
            yield from mappings(typing.cast(type, hint), f"{prefix}{name}.")


def field_docs(cls: type) -> dict[str, str]:
    """Return the texts that stand under a class's fields, those of base classes included; none of a plugin's."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base.__module__.startswith("fedproxy."):
            texts |= _own_docs(base.__module__, base.__qualname__)
    return texts


def first_line(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


@cache
def _own_docs(module: str, name: str) -> dict[str, str]:
    found = [node for node in _tree(source_file(module)).body if isinstance(node, ast.ClassDef) and node.name == name]
    body, texts = [statement for node in found for statement in node.body], {}
    for field, text in pairwise(body):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            texts[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return texts


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _default(item: dataclasses.Field[Any]) -> str | None:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return None
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    return str(getattr(hint, "__name__", hint) if not typing.get_args(hint) else hint).replace("typing.", "")

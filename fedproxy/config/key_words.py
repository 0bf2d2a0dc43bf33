"""What a ``key=value`` word may become: keys level by level, and the values of a key that has a list of them."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedproxy.config.source import configuration_class
from fedproxy.registry import Component

Values = tuple[str, ...]


def key_words(word: str, others: Sequence[str] = ()) -> list[str]:
    """Return what a word of a recipe's command line may become, sorted; nothing heavy is imported.

    A key ends with ``=``, or with the dot behind its next level, so that a few words stand for hundreds of keys.

    Args:
        word: As far as it is typed.
        others: The other words of the command: where they name a component's class, its options alone are told.
    """
    chosen = {key: value for key, _, value in (other.partition("=") for other in others)}
    found = dict(_leaves(configuration_class(), "", chosen))
    key, sign, _ = word.partition("=")
    if sign:
        words = {f"{key}={value}" for value in found.get(key, ())}
    else:
        words = {_to_next_dot(f"{name}=", len(word)) for name in found if name.startswith(word)}
    return sorted(candidate for candidate in words if candidate.startswith(word))


def _to_next_dot(key: str, typed: int) -> str:
    dot = key.find(".", typed)
    return key if dot < 0 else key[: dot + 1]


def _leaves(cls: type[Any], prefix: str, chosen: dict[str, str]) -> Iterator[tuple[str, Values]]:
    """Yield every key below a class with the values that it has a list of."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        inner = (get_args(hint) or (hint,))[-1]
        if not (isinstance(inner, type) and is_dataclass(inner)):
            yield key, _values(hint)
        elif not issubclass(inner, Component):
            yield from _leaves(inner, f"{key}.", chosen)
        elif inner is hint:
            yield f"{key}.name", inner.names()
            wanted = chosen.get(f"{key}.name")
            for name in [wanted] if wanted in inner.names() else inner.names():
                yield from _leaves(inner.by_name(name), f"{key}.", chosen)
        else:  # a mapping of members, of which some are set elsewhere
            for name in inner.names():
                member: Any = inner.by_name(name)
                if getattr(member, "optional", True):
                    yield from _leaves(member, f"{key}.{name}.", chosen)


def _values(hint: Any) -> Values:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(value for part in get_args(hint) for value in _values(part))
    if get_origin(hint) is Literal:
        return tuple(str(value) for value in get_args(hint))
    return {bool: ("true", "false"), type(None): ("null",)}.get(hint, ())

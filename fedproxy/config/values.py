"""One plain value as its declared type, or one line that says the rule."""

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedproxy.errors import ConfigError, one_line

_RULES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_TRUTH = {"true", "false", "yes", "no", "y", "n", "on", "off", "1", "0"}
_LARGEST = 2**63 - 1
"""Largest whole number: what libraries count in."""
_ELEMENTS = {int: "whole numbers like [0,1]", float: "numbers like [0.5,1.0]", str: "words like [a,b]"}


def typed(hint: Any, value: Any, key: str) -> Any:
    """Convert one plain value to its declared type.

    Raises:
        ConfigError: If it does not fit, or a number is infinite, none, or a whole one of more than 63 bits.
    """
    misfit = ConfigError(f"{key} must be {_rule(hint)}, got {one_line(repr(value), 80)}")
    _check_texts(hint, value, key)
    parts = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    if _is_flat(hint) and any(isinstance(part, list | dict) for part in parts):
        raise misfit
    if hint is bool and str(value).lower() not in _TRUTH:  # OmegaConf takes every number but 0 for true
        raise misfit
    try:
        merged = OmegaConf.merge(_schema(hint), {"value": value})
        result = OmegaConf.to_object(merged).value  # type: ignore[union-attr]
    except (OmegaConfBaseException, TypeError, ValueError):
        raise misfit from None
    numbers = result.values() if isinstance(result, dict) else result
    for number in numbers if isinstance(result, list | tuple | dict) else (result,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{key} must be finite, got {number}; {_unlimited(hint)}")
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise ConfigError(f"{key} must be at most {_LARGEST} in size, got {one_line(number, 40)}; give less")
    return result


@functools.cache
def _schema(hint: Any) -> Any:
    """Return a mapping of one value of this type, to merge others into."""
    return OmegaConf.structured(dataclasses.make_dataclass("Schema", [("value", hint)]))


def _check_texts(hint: Any, value: Any, key: str) -> None:
    """Refuse what YAML made a number, a truth value or a mapping of where text is meant: 1e3, on, a name's dot.

    Raises:
        ConfigError: Naming the key.
    """
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in hints and not {int, float, bool} & set(hints):
        texts = {key: value}
    elif dict[str, str] in hints and isinstance(value, dict):
        texts = {f"{key}.{name}": text for name, text in value.items()}
        texts |= {f"{key}: the name {name}": name for name in value if not isinstance(name, str)}
    elif list[str] in hints and isinstance(value, list):
        texts = {f"{key}[{index}]": text for index, text in enumerate(value)}
    else:
        return
    for where, text in texts.items():
        if isinstance(text, dict):
            raise ConfigError(
                f"{where} must be a text, got a mapping: a dot in a key begins another level; use a name without dots, "
                "or write it into a recipe file"
            )
        if isinstance(text, bool | int | float):
            raise ConfigError(f"{where} must be a text, and YAML reads {text!r} in its place; put it into quotes")


def _unlimited(hint: Any) -> str:
    optional = types.NoneType in typing.get_args(hint)
    return "write null where there is no limit" if optional else "give a number"


def _is_flat(hint: Any) -> bool:
    """Whether a list's or mapping's parts are plain values."""
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_args(part)[-1:] and typing.get_args(part)[-1] is not Any for part in hints)


def _rule(hint: Any) -> str:
    """Return in words what a type takes."""
    if isinstance(hint, types.UnionType):
        some = [part for part in typing.get_args(hint) if part is not types.NoneType]
        return " or ".join(map(_rule, some)) + (", or null" if len(some) < len(typing.get_args(hint)) else "")
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is dict:
        return {
            Any: "a mapping like {a: b}",
            int: "a mapping of names to whole numbers like {a: 4}",
            float: "a mapping of names to numbers like {a: 0.5}",
        }.get(parts[1], "a mapping of names to texts like {a: b}")
    if origin in (list, tuple):
        return f"a list of {_ELEMENTS.get(parts[0], 'values like [a,b]')}"
    return _RULES.get(hint, "a plain value")

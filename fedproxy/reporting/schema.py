"""Plain JSON data into typed dataclasses, with errors that name the key and the rule."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class SchemaError(ValueError):
    """A value does not fit the schema; the message reads ``key.path must be ..., got ...``."""


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """Return dataclass ``cls`` filled from the mapping ``data``.

    Keys that the class lacks are ignored (a later 1.x may add some); fields that allow None or have a default may be
    missing.

    Args:
        cls: A dataclass whose annotations are str, int, float, bool, Any, dataclasses, or Sequence, Mapping and
            unions of those.
        data: Parsed JSON.
        where: Key path of ``data``, for errors.

    Raises:
        SchemaError: If a key is missing or a value has another type.
    """
    if not isinstance(data, Mapping):
        raise SchemaError(f"{where or 'the report'} must be an object, got {_shown(data)}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = f"{where}.{field.name}" if where else field.name
        if field.name in data:
            values[field.name] = _value(hints[field.name], data[field.name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{key} is missing")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _union(arguments, value, where)
    if origin is Sequence:
        if not isinstance(value, list | tuple):
            raise SchemaError(f"{where} must be a list, got {_shown(value)}")
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise SchemaError(f"{where} must be an object, got {_shown(value)}")
        return {str(key): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type[Any], hint), value, where)
    return _scalar(hint, value, where)


def _union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    problems = []
    for hint in arguments:
        if hint is not types.NoneType:
            try:
                return _value(hint, value, where)
            except SchemaError as error:
                problems.append(str(error))
    raise SchemaError(problems[-1])


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise SchemaError(f"{where} must be {names.get(hint, hint.__name__)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

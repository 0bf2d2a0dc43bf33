"""How a RunConfig is read: defaults < recipe < command line, typed once here and plain values below."""

import dataclasses
import importlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedproxy.config.schema import RunConfig
from fedproxy.errors import ConfigError, first_line, nearest
from fedproxy.overrides import as_typed
from fedproxy.recipe_files import find_recipe
from fedproxy.registry import Component


def load_config(arguments: Sequence[str]) -> RunConfig:
    """Read ``recipe=NAME key=value ...`` into a checked configuration.

    Args:
        arguments: Command line words. ``recipe`` names a shipped recipe, or a ``.yaml`` file.

    Raises:
        ConfigError: On the first thing that does not exist, has the wrong type or lies out of range; one line that
            names the key, the rule and the nearest known name.
    """
    overrides = _parse_arguments(arguments)
    name = overrides.pop("recipe", None)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"recipe must be a recipe's name or a .yaml file, got {name!r}")
    layers = [*(_recipe_layers(name) if name else []), overrides]
    plugins = _listed_plugins(layers)
    for module in plugins:
        _import_plugin(module)
    if plugins:  # only now are the types of their components' options known
        layers[-1] = {key: value for key, value in _parse_arguments(arguments).items() if key != "recipe"}
    merged = OmegaConf.create({"output_dir": "runs/${recipe}", "recipe": "custom"})
    for layer in layers:
        _drop_foreign_options(merged, layer)
        with _one_line_errors():
            merged = typing.cast(DictConfig, OmegaConf.merge(merged, layer))
    with _one_line_errors():
        node = OmegaConf.to_container(merged, resolve=True)
    config: RunConfig = _build(RunConfig, node, "")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that :func:`load_config` reads back from a file."""
    fields: dict[str, Any] = {"name": config.name} if isinstance(config, Component) else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        fields[item.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
    return fields


def to_yaml(config: RunConfig) -> str:
    """Return a configuration as YAML, itself a valid recipe file, which never asks to overwrite anything."""
    return OmegaConf.to_yaml(OmegaConf.create({**to_dict(config), "overwrite": False}))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"{argument!r} is no key=value argument; write, for example, federation.rounds=3")
        if value == "None":
            raise ConfigError(f"{key}=None would be the text 'None'; write {key}=null")
        with _one_line_errors(key):
            OmegaConf.from_dotlist([as_typed(argument, RunConfig)])
    with _one_line_errors():
        words = [as_typed(argument, RunConfig) for argument in arguments]
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist(words), resolve=False)
    return typing.cast(dict[str, Any], parsed)


def _recipe_layers(name: str) -> list[Any]:
    """Return a recipe file and those it extends, the most general first."""
    layers: list[Any] = []
    seen: set[Path] = set()
    wanted: Any = name
    while wanted:
        path = find_recipe(str(wanted))
        if path in seen:
            raise ConfigError(f"recipe {name!r} extends itself through {wanted!r}; remove one `extends`")
        seen.add(path)
        layer = _read_yaml(path)
        if layer.get("overwrite", False) is not False:
            raise ConfigError(
                f"recipe file {path}: overwrite deletes a run, so it comes from the command line alone; remove the key"
            )
        layer.setdefault("recipe", path.stem if path.name in str(wanted) else wanted)
        wanted = layer.pop("extends", None)
        layers.insert(0, layer)
    return layers


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(layer, dict):
        raise ConfigError(f"recipe file {path} must hold a mapping of keys to values")
    return {str(key): value for key, value in layer.items()}


def _listed_plugins(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    listed = [layer["plugins"] for layer in layers if layer.get("plugins")]
    plugins = listed[-1] if listed else []
    if not isinstance(plugins, list) or not all(isinstance(module, str) for module in plugins):
        raise ConfigError(f"plugins must be a list of module names, got {plugins!r}")
    return plugins


def _import_plugin(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"plugins: cannot import {module!r} ({error}); is its folder on PYTHONPATH?") from error


def _drop_foreign_options(merged: DictConfig, layer: Mapping[str, Any]) -> None:
    """Where ``layer`` names another class for a node, drop the options that earlier layers gave the old one."""
    for path in _component_paths(RunConfig):
        new = _lookup(layer, path)
        old = OmegaConf.select(merged, path)
        if (
            isinstance(new, Mapping)
            and "name" in new
            and isinstance(old, DictConfig)
            and old.get("name") != new["name"]
        ):
            OmegaConf.update(merged, path, {}, merge=False)


def _component_paths(cls: type, prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and issubclass(hint, Component):
            paths.append(prefix + name)
        elif dataclasses.is_dataclass(hint):
            paths += _component_paths(typing.cast(type, hint), f"{prefix}{name}.")
    return paths


def _lookup(node: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _build(cls: type[Any], node: Any, path: str) -> Any:
    """Build a dataclass from plain values: nested dataclasses and components one by one, leaves typed by OmegaConf."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path} must be a mapping of options, got {node!r}")
    if issubclass(cls, Component):
        node = dict(node)
        cls = cls.by_name(_component_name(cls, node, path))
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in node:
        if key not in fields:
            raise ConfigError(f"{_join(path, key)}: unknown key{nearest(str(key), fields)}")
    values: dict[str, Any] = {}
    for name, item in fields.items():
        key, hint = _join(path, name), hints[name]
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(hint) and (name in node or required):
            values[name] = _build(typing.cast(type, hint), node.get(name, {}), key)
        elif name in node:
            values[name] = _typed(hint, node[name], key)
        elif required:
            raise ConfigError(f"{key} is missing; give it in the recipe or as {key}=VALUE")
    return cls(**values)


def _component_name(cls: type[Component], node: dict[str, Any], path: str) -> str:
    name = node.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name is missing; known: {', '.join(cls.names())}")
    try:
        cls.by_name(name)
    except ConfigError:
        raise ConfigError(f"{path}.name: unknown {cls.family} {name!r}{nearest(name, cls.names())}") from None
    return name


def _typed(hint: Any, value: Any, key: str) -> Any:
    """Convert one plain value to its declared type, or say in one line why it does not fit."""
    schema = dataclasses.make_dataclass("Schema", [("value", hint)])
    rule = _collection_rule(hint)
    misfit = ConfigError(f"{key} must be {rule}, got {value!r}")
    _check_texts(hint, value, key)
    if rule and isinstance(value, list) and any(isinstance(part, list | dict) for part in value):
        raise misfit
    with _one_line_errors(key):
        try:
            typed = OmegaConf.merge(OmegaConf.structured(schema), {"value": value})
        except (OmegaConfBaseException, TypeError):
            if rule:
                raise misfit from None
            raise
        return OmegaConf.to_object(typed).value  # type: ignore[union-attr]


def _check_texts(hint: Any, value: Any, key: str) -> None:
    """Refuse what YAML made a number, a truth value or a mapping of where text is meant: 2026_11_29, on, a name's dot.

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


_ELEMENTS = {int: "whole numbers like [0,1]", float: "numbers like [0.5,1.0]", str: "words like [a,b]"}


def _collection_rule(hint: Any) -> str | None:
    """Return in words what a list or mapping must be, and None for any other type, of which OmegaConf speaks well."""
    if isinstance(hint, types.UnionType):
        rules = [rule for part in typing.get_args(hint) if (rule := _collection_rule(part))]
        return f"{rules[0]}, or null" if rules else None
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return "a mapping like {a: b}"
    return f"a list of {_ELEMENTS[parts[0]]}" if origin in (list, tuple) else None


@contextmanager
def _one_line_errors(key: str = "") -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        where = key or getattr(error, "full_key", None)
        first = first_line(error)
        raise ConfigError(f"{where}: {first}" if where else first) from None


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)

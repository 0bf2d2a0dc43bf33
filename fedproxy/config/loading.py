"""How a RunConfig is read: defaults < recipe < command line, typed once here and plain values below."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedproxy.config.plugins import import_plugins, trusted_plugins
from fedproxy.config.references import check_references, resolve
from fedproxy.config.source import configuration_class
from fedproxy.config.yaml_files import read_mapping
from fedproxy.errors import ConfigError, FedProxyError, first_line, nearest, one_line
from fedproxy.recipe_files import find_recipe
from fedproxy.registry import Component

if TYPE_CHECKING:
    from fedproxy.config.schema import RunConfig

_SCHEMA = "fedproxy.config.schema"


def load_config(arguments: Sequence[str]) -> "RunConfig":
    """Read ``recipe=NAME key=value ...`` into a checked configuration.

    Args:
        arguments: Command line words. ``recipe`` names a shipped recipe, or a ``.yaml`` file.

    Raises:
        ConfigError: On the first thing that does not exist, has the wrong type or lies out of range; one line that
            names the key, the rule and the nearest known name. Where no plugin is named, it is raised before anything
            heavy is imported.
    """
    layers, plugins = _read(arguments)
    _check_early(layers, plugins)
    import_plugins(plugins)
    from fedproxy.config.schema import RunConfig

    config: RunConfig = _configure(RunConfig, layers)
    return config


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse at once what :func:`load_config` would refuse, as far as no library and no plugin is needed to tell.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    _check_early(*_read(arguments))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that :func:`load_config` reads back from a file."""
    fields: dict[str, Any] = {"name": config.name} if isinstance(config, Component) else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        fields[item.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
    return fields


def to_yaml(config: "RunConfig") -> str:
    """Return a configuration as YAML, itself a valid recipe file."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


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
            OmegaConf.from_dotlist([argument])
    with _one_line_errors():
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)), resolve=False)
    return typing.cast(dict[str, Any], parsed)


def _read(arguments: Sequence[str]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return what recipes and the command line set, the most general first, and the plugins that the user names."""
    given = _parse_arguments(arguments)
    check_references(given, way_out="let the shell put it in, or write the value itself")
    name = given.pop("recipe", None)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"recipe must be a recipe's name or a .yaml file, got {name!r}")
    files = _recipe_layers(name) if name else []
    defaults = {"output_dir": "runs/${recipe}", "recipe": "custom"}
    return [defaults, *(layer for _, layer in files), given], trusted_plugins(given, files)


def _recipe_layers(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a recipe file and those it extends, the most general first, each with its name for errors."""
    layers: list[tuple[str, dict[str, Any]]] = []
    seen: set[Path] = set()
    wanted = name
    while wanted:
        path = find_recipe(wanted)
        where = f"recipe file {path}"
        if path in seen:
            raise ConfigError(f"recipe {name!r} extends itself through {wanted!r}; remove one `extends`")
        seen.add(path)
        layer = read_mapping(path, "recipe file")
        check_references(layer, where)
        layer.setdefault("recipe", path.stem if path.name in wanted else wanted)
        wanted = layer.pop("extends", None) or ""
        if not isinstance(wanted, str):
            raise ConfigError(f"{where}: extends must be one recipe's name, got {one_line(repr(wanted), 80)}")
        layers.insert(0, (where, layer))
    return layers


def _check_early(layers: Sequence[Mapping[str, Any]], plugins: Sequence[str]) -> None:
    """Find mistakes before torch and others are imported; plugins may know what the package does not."""
    if plugins or _SCHEMA in sys.modules:
        return
    try:
        _configure(configuration_class(), layers)
    except FedProxyError:
        raise
    except Exception:
        return  # a rule that needs a library: the class itself tells


def _configure(schema: type[Any], layers: Sequence[Mapping[str, Any]]) -> Any:
    components = _component_paths(schema)
    merged: dict[str, Any] = {}
    for layer in layers:
        _drop_foreign_options(merged, layer, components)
        merged = _merged(merged, layer)
    return _build(schema, resolve(merged), "")


def _merged(old: Any, new: Any) -> Any:
    """Return ``new`` over ``old``: mappings key by key, everything else as a whole."""
    if not isinstance(new, Mapping):
        return new
    below = old if isinstance(old, Mapping) else {}
    return {**below, **{key: _merged(below.get(key), value) for key, value in new.items()}}


def _drop_foreign_options(merged: dict[str, Any], layer: Mapping[str, Any], components: Sequence[str]) -> None:
    """Where ``layer`` names another class for a node, drop the options that earlier layers gave the old one."""
    for path in components:
        new, old = _lookup(layer, path), _lookup(merged, path)
        if (
            isinstance(new, Mapping)
            and "name" in new
            and isinstance(old, dict)
            and old.get("name") != new["name"]
        ):
            old.clear()


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

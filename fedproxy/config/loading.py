"""How a RunConfig is read: defaults < recipe < command line, typed once here and plain values below."""

import dataclasses
import hashlib
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedproxy.config.plugins import import_plugins, trusted_plugins
from fedproxy.config.references import check_references, resolve
from fedproxy.config.source import check_trainer_options, configuration_class
from fedproxy.config.values import typed
from fedproxy.errors import ConfigError, FedProxyError, nearest, one_line
from fedproxy.overrides import as_typed
from fedproxy.recipe_files import find_recipe
from fedproxy.registry import Component
from fedproxy.yaml_files import dump_yaml, parse_yaml, read_mapping

if TYPE_CHECKING:
    from fedproxy.config.schema import RunConfig

_SCHEMA = "fedproxy.config.schema"

_COMMAND_LINE_ALONE = {
    "overwrite": "deletes a run",
    "accept_changed": "lets one start go on with changed inputs",
}
"""Keys that no recipe file may set, and what they do."""
_ONE_START = ("resume", *_COMMAND_LINE_ALONE)
"""Keys that say how to start, and nothing of the run."""


def load_config(arguments: Sequence[str]) -> "RunConfig":
    """Read ``recipe=NAME key=value ...`` into a checked configuration.

    Args:
        arguments: Command line words. ``recipe`` names a shipped recipe, or a ``.yaml`` file.

    Raises:
        ConfigError: On the first thing that does not exist, has the wrong type or lies out of range; one line that
            names the key, the rule and the nearest known name. Where no plugin is named, it is raised before anything
            heavy is imported.
    """
    files, plugins = _read(arguments)
    if _SCHEMA not in sys.modules:
        _check_early(files, arguments, plugins)
    import_plugins(plugins)
    from fedproxy.config.schema import RunConfig

    config: RunConfig = _configure(RunConfig, files, arguments)
    return config


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse at once what :func:`load_config` would refuse, as far as no library and no plugin is needed to tell.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    files, plugins = _read(arguments)
    _check_early(files, arguments, plugins)


def read_early(arguments: Sequence[str]) -> tuple[Any, str] | None:
    """Return a configuration whose parts that need a library are not checked, and the SHA-256 of what was given.

    None where a plugin is named, or a rule needs a library.

    Raises:
        ConfigError: As :func:`load_config`, as far as no library is needed to tell.
    """
    files, plugins = _read(arguments)
    early = _check_early(files, arguments, plugins)
    if early is None:
        return None
    given = {key: value for key, value in parse_arguments(arguments).items() if key not in _ONE_START}
    content = json.dumps([*files, given], sort_keys=True, default=str)
    return early, hashlib.sha256(content.encode()).hexdigest()


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that :func:`load_config` reads back from a file."""
    fields: dict[str, Any] = {"name": config.name} if isinstance(config, Component) else {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        fields[item.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        if isinstance(value, dict):  # members of a family, named by their keys
            nested = {key: to_dict(part) for key, part in value.items() if isinstance(part, Component)}
            for part in nested.values():
                del part["name"]
            fields[item.name] = {**value, **nested}
    return fields


def to_yaml(config: "RunConfig") -> str:
    """Return a configuration as YAML, itself a valid recipe file, without what is said for one start alone."""
    return dump_yaml({**to_dict(config), "overwrite": False, "accept_changed": []})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parse_arguments(arguments: Sequence[str], schema: type[Any] | None = None) -> dict[str, Any]:
    """Return ``key=value`` words as nested plain values, references as they are written.

    Args:
        arguments: The words.
        schema: Dataclass whose keys of type text take their values as they are typed; None reads all as YAML.

    Raises:
        ConfigError: If a word is not of that form, or its value is not YAML.
    """
    parsed: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(
                f"{one_line(repr(argument), 80)} is not a key=value argument; write, for example, federation.rounds=3"
            )
        parts = key.split(".")
        if not all(parts):
            raise ConfigError(f"{one_line(key, 80)}: a key is made of names with one dot between; correct it")
        if text == "None":
            raise ConfigError(f"{one_line(key, 80)}=None would be the text 'None'; write {one_line(key, 80)}=null")
        try:
            value = parse_yaml(text if schema is None else as_typed(argument, schema).partition("=")[2])
        except ValueError as error:
            raise ConfigError(
                f"{one_line(key, 80)}: {one_line(text, 60)} cannot be read as YAML ({error}); put a text into quotes"
            ) from None
        for part in reversed(parts):
            value = {part: value}
        parsed = _merged(parsed, value)
    check_references(parsed, way_out="let the shell put it in, or write the value itself")
    return parsed


def _read(arguments: Sequence[str]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return what recipes set, the most general first, and the plugins that the user names."""
    given = parse_arguments(arguments, configuration_class())
    name = given.pop("recipe", None)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"recipe must be a recipe's name or a .yaml file, got {one_line(repr(name), 80)}")
    files = _recipe_layers(name) if name else []
    return [layer for _, layer in files], trusted_plugins(given, files)


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
        for key, effect in _COMMAND_LINE_ALONE.items():
            if layer.get(key):
                raise ConfigError(f"{where}: {key} {effect}, so it comes from the command line alone; remove the key")
        layer.setdefault("recipe", path.stem if path.name in wanted else wanted)
        wanted = layer.pop("extends", None) or ""
        if not isinstance(wanted, str):
            raise ConfigError(f"{where}: extends must be one recipe's name, got {one_line(repr(wanted), 80)}")
        layers.insert(0, (where, layer))
    return layers


def _check_early(files: Sequence[Mapping[str, Any]], arguments: Sequence[str], plugins: Sequence[str]) -> Any:
    """Find mistakes before torch and others are imported; None where a plugin or a library knows more.

    Where they are imported already, the classes themselves are asked: one of them may be a notebook's own.
    """
    if plugins:
        return None
    real = sys.modules.get(_SCHEMA)
    try:
        early = _configure(configuration_class() if real is None else real.RunConfig, files, arguments)
        check_trainer_options(early.trainer)
    except FedProxyError:
        raise
    except Exception:
        return None  # a rule that needs a library: the class itself tells
    return early


def _configure(schema: type[Any], files: Sequence[Mapping[str, Any]], arguments: Sequence[str]) -> Any:
    """Return ``schema`` filled from defaults < files < arguments."""
    components = _component_paths(schema)
    given = {key: value for key, value in parse_arguments(arguments, schema).items() if key != "recipe"}
    plain = (item for item in dataclasses.fields(schema) if isinstance(item.default, str | int))
    merged: dict[str, Any] = {item.name: item.default for item in plain}  # what ${seed} and others may name
    for layer in (*files, given):
        _drop_foreign_options(merged, layer, components)
        merged = _merged(merged, layer)
    return build(schema, resolve(merged), "")


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
        if isinstance(new, Mapping) and "name" in new and isinstance(old, dict) and old.get("name") != new["name"]:
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


def build(cls: type[Any], node: Any, path: str) -> Any:
    """Build a dataclass from plain values: nested dataclasses and components one by one, leaves by :func:`typed`.

    Args:
        cls: The dataclass; of a component's family, the member that ``name`` tells is built.
        node: Its options as YAML gives them.
        path: Where they stand in the recipe, for messages.

    Raises:
        ConfigError: If a key is unknown or missing, or a value does not fit; names the key.
    """
    if not isinstance(node, Mapping):
        line = f"{path} must be a mapping of options, got {one_line(repr(node), 80)}"
        if isinstance(node, str):
            line += f"; write {path}.{'name' if issubclass(cls, Component) else 'KEY'}={one_line(node, 80)}"
        raise ConfigError(line)
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
        if name in node:
            values[name] = _value(hint, node[name], key)
        elif required and dataclasses.is_dataclass(hint):
            values[name] = build(typing.cast(type, hint), {}, key)
        elif required:
            raise ConfigError(f"{key} is missing; give it in the recipe or as {key}=VALUE")
    return cls(**values)


def _value(hint: Any, value: Any, key: str) -> Any:
    """Return one plain value as what a field of this type holds."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    if typing.get_origin(hint) is dict and _is_family(typing.get_args(hint)[1]):
        return _build_members(typing.get_args(hint)[1], value, key)
    return typed(hint, value, key)


def _build_members(family: type[Component], node: Any, path: str) -> dict[str, Any]:
    """Build members of a family from a mapping of their names to their options."""
    if not isinstance(node, Mapping):
        names = ", ".join(family.names())
        shown = one_line(repr(node), 80)
        raise ConfigError(f"{path} must be a mapping of names to options, got {shown}; known: {names}")
    made = {}
    for name, options in node.items():
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"{_join(path, name)} must be a mapping of options, got {one_line(repr(options), 80)}; write "
                f"{_join(path, name)}={{}} for the defaults"
            )
        if name not in family.names():
            raise ConfigError(f"{_join(path, name)}: unknown {family.family}{nearest(str(name), family.names())}")
        made[str(name)] = build(family, {**options, "name": name}, _join(path, name))
    return made


def _is_family(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Component)


def _component_name(cls: type[Component], node: dict[str, Any], path: str) -> str:
    known = f"known: {', '.join(cls.names())}"
    if "name" not in node:
        raise ConfigError(f"{path}.name is missing; {known}")
    name = node.pop("name")
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name must be one of the names, got {one_line(repr(name), 80)}; {known}")
    if name not in cls.names():
        raise ConfigError(f"{path}.name: unknown {cls.family} {one_line(repr(name), 80)}{nearest(name, cls.names())}")
    return name


def _join(path: str, key: object) -> str:
    return f"{path}.{one_line(key, 80)}" if path else one_line(key, 80)

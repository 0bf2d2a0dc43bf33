"""What `fit --help` says of a recipe's keys, from the texts under their fields; nothing heavy is imported."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from fedproxy.config.keys import Key, families, first_line, leaves, mappings
from fedproxy.config.source import configuration_class
from fedproxy.errors import ConfigError, nearest
from fedproxy.registry import Component

_WIDTH = 100
_MARGIN = " " * 6


def describe_keys(nodes: Sequence[str]) -> str:
    """Return a recipe's keys with their defaults and meanings, grouped by node.

    Args:
        nodes: Nodes or keys to describe with all that they can name, such as ``aggregator`` or ``client.lr``. Without
            any, all plain keys and the names of components.

    Raises:
        ConfigError: If nothing is called so.
    """
    if not nodes:
        return "\n".join([*_plain(""), _title("components, with their options behind --help NODE"), *_components()])
    return "\n".join(line for node in nodes for line in _node(node))


def _node(node: str) -> Iterator[str]:
    node, config = node.rstrip("."), configuration_class()
    lines, known = list(_plain(node)), {key.path for key in leaves(config)}
    for path, family, _ in families(config):
        known.add(path)
        if _within(path, node):
            lines += [_title(f"{path}: {first_line(family)}"), *_members(path, map(family.by_name, family.names()))]
    for path, members in mappings(config):
        known |= {path, *(f"{path}.{member.name}" for member in members)}
        lines += _members(path, (m for m in members if _within(f"{path}.{m.name}", node)), each=True)
    if not lines:
        known |= {path.partition(".")[0] for path in known}
        raise ConfigError(f"--help {node}: no key is called so{nearest(node, sorted(known))}")
    yield from lines


def _plain(node: str) -> Iterator[str]:
    groups: dict[str, list[Key]] = {"": []}
    for key in leaves(configuration_class()):
        if _within(key.path, node):
            groups.setdefault(key.path.rpartition(".")[0], []).append(key)
    for head, keys in groups.items():
        if keys:
            yield _title(head or "the run")
        for key in keys:
            yield from _key(key)


def _components() -> Iterator[str]:
    for path, family, default in families(configuration_class()):
        yield f"  {path}.name={default}"
        yield from _text(f"{first_line(family)} One of {', '.join(family.names())}.")
    for path, members in mappings(configuration_class()):
        yield f"  {path}"
        yield from _text(f"Any of {', '.join(member.name for member in members)}, each by its name.")


def _members(path: str, members: Iterable[type[Component]], *, each: bool = False) -> Iterator[str]:
    """Describe members of a family: of one of them a node has the options, or each has a node of its own."""
    for member in members:
        yield f"  {path}.{member.name}" if each else f"  {path}.name={member.name}"
        yield from _text(first_line(member))
        for key in leaves(member, f"{path}.{member.name}." if each else f"{path}."):
            yield from ("  " + line for line in _key(key))


def _key(key: Key) -> Iterator[str]:
    yield f"  {key.path}" + (" (must be given)" if key.default is None else f"={key.default}")
    yield from _text(key.meaning.replace("``", ""))


def _text(text: str) -> Iterable[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=_MARGIN, subsequent_indent=_MARGIN, break_long_words=False)


def _title(words: str) -> str:
    return f"\n{words}\n"


def _within(path: str, node: str) -> bool:
    return not node or path == node or path.startswith(f"{node}.")

"""``${key}`` in a configuration: the value of another key, put in once. Nothing else behind a ``$`` is ever read."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedproxy.errors import ConfigError, nearest, one_line

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
_MOST = 1000
"""Most references that a configuration may follow."""
_LONGEST = 10_000
"""Most characters of a text that references make."""


def check_references(node: Any, where: str = "", way_out: str = "write the value itself") -> None:
    """Refuse every text with a ``${`` that does not name another key, such as ``${oc.env:HOME}``.

    Args:
        node: Plain values as they were read.
        where: The file, for the error; empty for the command line.
        way_out: What to do instead.

    Raises:
        ConfigError: One line with the file, the key and the way out.
    """
    for key, text in _texts(node, ""):
        prefix = f"{where}: {key}" if where else key
        if text == "???":
            raise ConfigError(f"{prefix} is missing: ??? stands for a value to be given; give it")
        if "${" not in text:
            continue
        odd = next((found for found in _REFERENCE.findall(text) if not _KEY.fullmatch(found)), None)
        if odd is not None or "${" in _REFERENCE.sub("", text):
            shown = text if odd is None else f"${{{odd}}}"
            raise ConfigError(
                f"{prefix}: {one_line(shown, 80)} is not read: ${{key}} for another key of the configuration is all "
                f"that a $ may stand for; {way_out}"
            )


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with every ``${key}`` replaced by that key's value.

    Raises:
        ConfigError: If a key is unknown, refers to itself, or the result is no plain text of a sensible length.
    """
    return _Resolver(config).whole()


class _Resolver:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._followed = 0

    def whole(self) -> dict[str, Any]:
        return {key: self._value(value, str(key), ()) for key, value in self._config.items()}

    def _value(self, node: Any, where: str, behind: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: self._value(value, f"{where}.{key}", behind) for key, value in node.items()}
        if isinstance(node, list):
            return [self._value(value, f"{where}[{index}]", behind) for index, value in enumerate(node)]
        return self._text(node, where, behind) if isinstance(node, str) and "${" in node else node

    def _text(self, text: str, where: str, behind: tuple[str, ...]) -> Any:
        only = _REFERENCE.fullmatch(text)
        if only:
            return self._follow(only[1], where, behind)
        result = _REFERENCE.sub(lambda found: str(self._follow(found[1], where, behind)), text)
        if "${" in result or len(result) > _LONGEST:
            rule = "a reference again" if "${" in result else f"a text of more than {_LONGEST} characters"
            raise ConfigError(f"{where}: {one_line(text, 80)} would become {rule}; write the value itself")
        return result

    def _follow(self, key: str, where: str, behind: tuple[str, ...]) -> Any:
        self._followed += 1
        if key in behind:
            raise ConfigError(f"{where}: ${{{key}}} refers to itself; write the value itself")
        if self._followed > _MOST:
            raise ConfigError(f"{where}: more than {_MOST} references are followed; write the values themselves")
        node: Any = self._config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                known = node if isinstance(node, Mapping) else ()
                raise ConfigError(
                    f"{where}: ${{{key}}} names a key that neither the recipe nor the command line sets"
                    f"{nearest(part, map(str, known))}"
                )
            node = node[part]
        return self._value(node, where, (*behind, key))


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """Return every text below ``node``, keys of mappings included, with the key that holds it."""
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{where}.{key}" if where else str(key)
            if isinstance(key, str):
                yield path, key
            yield from _texts(value, path)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{where}[{index}]")

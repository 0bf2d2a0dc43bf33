"""Names that people give to clients, sources and studies: checked once where they come in, and made into file names."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from fedproxy.errors import ConfigError, one_line

LONGEST_NAME = 100
"""Most characters of a name."""
_SLUG = re.compile(r"[^a-z0-9]+")


def check_name(name: object, key: str) -> str:
    """Return ``name`` if it can stand for a client or a source.

    Args:
        name: What was given.
        key: The key that names it, for the error.

    Raises:
        ConfigError: If it is not a text of 1 to 100 printable characters without blanks at its ends.
    """
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= LONGEST_NAME
        or not name.isprintable()
        or name != name.strip()
    ):
        raise ConfigError(
            f"{key}: a name must be a text of 1 to {LONGEST_NAME} printable characters without blanks at its ends, "
            f"got {one_line(repr(name), 60)}; choose another name"
        )
    return str(name)


def check_names(names: Iterable[object], key: str) -> list[str]:
    """Return the names if each is good and no two could be taken for each other.

    Raises:
        ConfigError: If a name is not good (:func:`check_name`), or two differ in case or in composed letters alone.
    """
    checked: list[str] = []
    seen: dict[str, str] = {}
    for name in names:
        good = check_name(name, key)
        twin = seen.setdefault(folded(good), good)
        if len(seen) == len(checked):
            raise ConfigError(
                f"{key}: the names {twin!r} and {good!r} differ in case or composition alone; rename one of them"
            )
        checked.append(good)
    return checked


def folded(name: str) -> str:
    """Return a name in the form in which two names must differ: composed (NFC), case aside."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def file_stem(name: str) -> str:
    """Return what a file of this name is called: a readable slug and a hash, safe on every file system.

    At most 57 ASCII characters, no two names alike: ``Ward A`` is ``ward-a-`` and 16 hexadecimal digits.
    """
    ascii_ = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = _SLUG.sub("-", ascii_).strip("-")[:40].rstrip("-")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{slug}-{digest}" if slug else digest

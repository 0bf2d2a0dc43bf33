"""Which texts are a client's: all that stays of clients' rows with a server that must keep them out of public text."""

import hashlib
from collections.abc import Container, Iterable

from fedproxy.data.rows import Row

_TAIL_WORDS = 10
_HASH_BYTES = 16


class OwnedTexts(Container[str]):
    """Tells whether a text is a client's, from one hash per row; no text is kept.

    A text counts as a client's where the last ten words of both agree, letters' case aside: that finds rows of one data
    set that were rendered in two ways.

    Args:
        rows: All clients' rows.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._tails = frozenset(_tail_hash(_whole(row)) for row in rows)

    def __contains__(self, text: object) -> bool:
        """Return whether a client has this text, by its hash."""
        return isinstance(text, str) and _tail_hash(text) in self._tails


def _whole(row: Row) -> str:
    """Return a row's text; of a conversation its turns, which no blank divides by themselves."""
    return f"{row.prompt}{' ' if row.messages else ''}{row.target}"


def _tail_hash(text: str) -> bytes:
    tail = " ".join(text.lower().split()[-_TAIL_WORDS:])
    return hashlib.blake2b(tail.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()

"""A table as pages show it: finished text, no markup."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedproxy.errors import one_line

LONGEST = 2000
"""Most characters of a cell or a line of a page; texts of others were cut far below (errors.one_line)."""
LONGEST_COMMAND = 100_000
"""Most characters of a command that a page repeats."""


def shown(text: str, limit: int = LONGEST) -> str:
    """Return a text for one line of a page: printable and of a bounded length; an empty one stays empty."""
    return one_line(text, limit) if text.strip() else ""


def all_shown(value: Any) -> Any:
    """Return JSON types with every text, keys included, as :func:`shown` returns it."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {shown(key): all_shown(item) for key, item in value.items()}
    return [all_shown(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Table:
    """A table of finished cells; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong_last: bool = False
    """Whether the last row is a summary."""

    def __post_init__(self) -> None:
        """Turn every cell into the text that is shown."""
        object.__setattr__(self, "head", [shown(cell) for cell in self.head])
        object.__setattr__(self, "rows", [[shown(cell) for cell in row] for row in self.rows])

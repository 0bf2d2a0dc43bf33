"""A table as pages show it: finished text, no markup."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of finished cells; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong_last: bool = False
    """Whether the last row is a summary."""

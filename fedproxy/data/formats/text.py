"""Plain texts to go on training on."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.data.formats.base import DataFormat
from fedproxy.data.records import Columns, Record, text_of
from fedproxy.data.rows import Row


@dataclass(frozen=True)
class Text(DataFormat, name="text"):
    """A text without a prompt: the loss is taken on every token that another stands before."""

    column: str = "text"
    """Column of the text."""

    def required(self, columns: Columns) -> Sequence[str]:
        """Return the text's column."""
        return (self.column,)

    def row(self, record: Record, columns: Columns, *, source: str, key: str) -> Row:
        """Return the text as a target without a prompt."""
        return Row("", text_of(record, self.column), source, key, loss="all")

"""The format that a source's first record shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.data.formats.base import DataFormat
from fedproxy.data.formats.chat import Chat
from fedproxy.data.formats.instruction import Instruction
from fedproxy.data.formats.prompt_target import PromptTarget
from fedproxy.data.formats.text import Text
from fedproxy.data.records import Columns, Record
from fedproxy.data.rows import Row
from fedproxy.errors import DataError, one_line

_CHOICES = (Chat(), Instruction(), PromptTarget(), Text())
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Auto(DataFormat, name="auto"):
    """Looks at the first record of each source and takes chat, instruction, prompt_target or text, in this order."""

    def optional(self, columns: Columns) -> Sequence[str]:
        """Return the columns of all of them."""
        found = [(*choice.required(columns), *choice.optional(columns)) for choice in _CHOICES]
        return tuple(dict.fromkeys(name for names in found for name in names))

    def settled(self, record: Record, columns: Columns) -> DataFormat:
        """Return the first format whose columns the record has.

        Raises:
            DataError: If it has those of none; names its columns.
        """
        there = {name for name, value in record.values.items() if value is not None}
        for choice in _CHOICES:
            needed = choice.required(columns)
            if set(needed) <= there if needed else not there.isdisjoint(choice.optional(columns)[:2]):
                return choice
        known = ", ".join(one_line(name, 40) for name in record.values)
        raise DataError(
            f"{record.place}: data.format.name=auto knows none of its columns ({known}); name the format and its "
            "columns, for example data.format.name=instruction data.format.instruction=question"
        )

    def row(self, record: Record, columns: Columns, *, source: str, key: str) -> Row:
        """Return the row that the record by itself would be taken for."""
        return self.settled(record, columns).row(record, columns, source=source, key=key)

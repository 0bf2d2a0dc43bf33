"""Instructions with their answers, as the Alpaca data have them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.data.formats.base import DataFormat, conversation
from fedproxy.data.records import Columns, Record, optional_text, text_of
from fedproxy.data.rows import Row


@dataclass(frozen=True)
class Instruction(DataFormat, name="instruction"):
    """An instruction, an input that may be missing, and the output: one question and its answer in chat form.

    The Alpaca data's columns (Taori et al. 2023). Choice: the chat template frames the row, so that none of Alpaca's
    own headings ("### Instruction:") is in it; the input follows the instruction behind a blank line.
    """

    instruction: str = "instruction"
    """Column of the instruction."""
    input: str = "input"
    """Column of what it is about; it may be missing, null or empty."""
    output: str = "output"
    """Column of the answer."""
    system: str = "system"
    """Column of a system message; it may be missing, null or empty."""

    def required(self, columns: Columns) -> Sequence[str]:
        """Return the instruction's and the output's column."""
        return self.instruction, self.output

    def optional(self, columns: Columns) -> Sequence[str]:
        """Return the columns that may be missing."""
        return self.input, self.system

    def row(self, record: Record, columns: Columns, *, source: str, key: str) -> Row:
        """Return the conversation of two or three turns."""
        question, about = text_of(record, self.instruction), optional_text(record, self.input)
        turns = [
            {"role": "system", "content": optional_text(record, self.system)},
            {"role": "user", "content": f"{question}\n\n{about}" if about else question},
            {"role": "assistant", "content": text_of(record, self.output)},
        ]
        return conversation(turns[not turns[0]["content"] :], record.place, source=source, key=key, whole=False)

"""A prompt and what the model should write right after it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.data.formats.base import DataFormat, conversation
from fedproxy.data.records import Columns, Record, text_of
from fedproxy.data.rows import Row


@dataclass(frozen=True)
class PromptTarget(DataFormat, name="prompt_target"):
    """A prompt and its target, in the columns ``data.prompt_column`` and ``data.target_column``."""

    chat: bool = False
    """Whether they are a user's turn and the assistant's, which the chat template frames; else one plain text."""

    def required(self, columns: Columns) -> Sequence[str]:
        """Return both columns."""
        return columns.prompt, columns.target

    def row(self, record: Record, columns: Columns, *, source: str, key: str) -> Row:
        """Return both texts; where no whitespace stands between them, the target gets a blank in front."""
        prompt, target = text_of(record, columns.prompt), text_of(record, columns.target)
        if self.chat:
            turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": target})
            return conversation(turns, record.place, source=source, key=key, whole=False)
        if not (prompt[-1].isspace() or target[0].isspace()):
            target = f" {target}"
        return Row(prompt, target, source=source, key=key)

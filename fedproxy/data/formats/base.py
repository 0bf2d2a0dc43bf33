"""The family of data formats: what a class says about a record, and the rows that it makes of records."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.data.records import Columns, Record
from fedproxy.data.rows import Message, Row
from fedproxy.errors import DataError
from fedproxy.registry import Component


@dataclass(frozen=True)
class DataFormat(Component, family="data.format"):
    """Makes rows of records. A conversation becomes tokens where the tokenizer is: at the client."""

    def required(self, columns: Columns) -> Sequence[str]:
        """Return the columns of text that every record must have."""
        return ()

    def optional(self, columns: Columns) -> Sequence[str]:
        """Return further columns that are read where a source has them; lists and structs of text may be among them.

        A table must have one of them where nothing is required.
        """
        return ()

    def settled(self, record: Record, columns: Columns) -> "DataFormat":
        """Return the format of a source whose first record this is.

        Raises:
            DataError: If it cannot be told.
        """
        return self

    @abstractmethod
    def row(self, record: Record, columns: Columns, *, source: str, key: str) -> Row:
        """Return what a record says.

        Args:
            record: The record; columns beyond those asked for may be in it.
            columns: Names of columns that the recipe sets for all sources.
            source: Name of the data set.
            key: The row's key.

        Raises:
            DataError: If it lacks a part, or one is not of its kind; the message names the place and the way out.
        """


def conversation(
    messages: Sequence[Message], place: str, *, source: str, key: str, whole: bool, tools: Sequence[Message] = ()
) -> Row:
    """Return the row of a conversation; turns behind the last answer are left out, as no loss falls on them.

    Args:
        messages: Its turns, with roles as in :data:`fedproxy.data.rows.ROLES`.
        place: File and row in words, for errors.
        source: Name of the data set.
        key: The row's key.
        whole: Whether the loss is taken on every answer, else on the last one.
        tools: JSON schemas of the tools that it may call.

    Raises:
        DataError: If there is no answer, or nothing stands before the first one.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{place}: no turn is the assistant's; add an answer or remove the row")
    if answers[0] == 0:
        raise DataError(f"{place}: the first turn is the assistant's; put what it answers before it, or remove the row")
    kept = tuple(messages[: answers[-1] + 1])
    prompt = "\n".join(str(message["content"]) for message in kept[:-1])
    calls = kept[-1].get("tool_calls")
    target = str(kept[-1]["content"] or (json.dumps(calls, ensure_ascii=False) if calls else ""))
    loss = "all" if whole else "target"
    return Row(prompt, target, source, key, messages=kept, tools=tuple(tools), loss=loss)  # type: ignore[arg-type]

"""Conversations of several turns, as chat models are trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedproxy.data.formats.base import DataFormat, conversation
from fedproxy.data.records import Columns, Record, as_text, no_column, optional_text, shown
from fedproxy.data.rows import ROLES, Message, Row
from fedproxy.errors import DataError, nearest, one_line
from fedproxy.files import parse_json

MOST_TURNS = 1024
"""Most turns of a conversation: its text is rendered once for every answer."""
_NAMES = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"developer": "system", "function": "tool", "observation": "tool", "function_response": "tool"},
}
"""Roles by the names that data sets give them."""
_KEPT = ("name", "tool_call_id")


@dataclass(frozen=True)
class Chat(DataFormat, name="chat"):
    """A list of turns, each with ``role`` and ``content``, or ``from`` and ``value`` as in ShareGPT's files.

    The arguments of ``tool_calls`` may be objects or, as chat services send them, their JSON text.
    """

    column: str | None = None
    """Column of the turns, a list or its JSON text; null takes ``messages``, or ``conversations`` where a row has no
    messages."""
    tools: str = "tools"
    """Column of the tools' JSON schemas, a list or its JSON text; it may be missing, null or empty."""
    system: str = "system"
    """Column of a system message for a conversation that begins without one; it may be missing, null or empty."""
    loss: Literal["all", "last"] = "all"
    """Answers that the loss is taken on: all of the assistant's turns, or the last one."""
    roles: dict[str, str] = field(default_factory=dict)
    """Further names of roles, such as ``{patient: user, doctor: assistant}``."""

    def __post_init__(self) -> None:
        """Check that every role is mapped to one of the known ones."""
        wrong = sorted(set(self.roles.values()).difference(ROLES))
        self.require("roles", not wrong, f"names of {', '.join(ROLES)}")

    def optional(self, columns: Columns) -> Sequence[str]:
        """Return all columns; the first ones hold turns."""
        return *self._turns, self.tools, self.system

    @property
    def _turns(self) -> tuple[str, ...]:
        return ("messages", "conversations") if self.column is None else (self.column,)

    def row(self, record: Record, columns: Columns, *, source: str, key: str) -> Row:
        """Return the conversation.

        Raises:
            DataError: If there are no turns, too many, or one without a known role and a text; names the turn.
        """
        column = next((name for name in self._turns if record.values.get(name) is not None), None)
        if column is None:
            there = (name for name, value in record.values.items() if value is not None)
            raise no_column(record.place, self._turns[0], there)
        where = f"{record.place}: {column!r}"
        turns = _parsed(record.values[column], where)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where} must be a list of turns, got {shown(turns)}; correct it or remove the row")
        if len(turns) > MOST_TURNS:
            raise DataError(f"{where} has {len(turns)} turns, {MOST_TURNS} are the most; break it into several rows")
        messages = [self._message(turn, f"{where} turn {number}") for number, turn in enumerate(turns, 1)]
        system = optional_text(record, self.system)
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return conversation(
            messages, record.place, source=source, key=key, whole=self.loss == "all", tools=self._tools(record)
        )

    def _message(self, turn: Any, where: str) -> Message:
        if not isinstance(turn, Mapping):
            raise DataError(f"{where} must have a role and a content, got {shown(turn)}; correct it or remove the row")
        named = "role" if turn.get("role") is not None else "from"
        said = "content" if named == "role" else "value"
        name = turn.get(named)
        if name is None:
            found = ", ".join(one_line(key, 40) for key in turn)
            raise DataError(f"{where} has neither 'role' nor 'from' (it has: {found}); name who speaks")
        role = {**_NAMES, **self.roles}.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(
                f"{where}: unknown role {shown(name)}{nearest(str(name), _NAMES)}; or give it a role with "
                "data.format.roles"
            )
        calls, content = turn.get("tool_calls") or None, turn.get(said)
        if content is None and calls is None:
            raise DataError(f"{where} has no {said!r}; fill it in or remove the row")
        message = {"role": role, "content": "" if content is None else _text(content, where, repr(said))}
        if role == "assistant" and calls is None and not message["content"].strip():
            raise DataError(f"{where}: the answer's {said!r} is empty; fill it in or remove the row")
        message |= {key: as_text(where, repr(key), turn[key]) for key in _KEPT if turn.get(key) is not None}
        if calls is None:
            return message
        return {**message, "tool_calls": [_call(call) for call in _objects(calls, f"{where}: 'tool_calls'")]}

    def _tools(self, record: Record) -> list[Mapping[str, Any]]:
        where = f"{record.place}: {self.tools!r}"
        found = _parsed(record.values.get(self.tools), where)
        return _objects(found, where) if found else []


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call with its arguments as an object, which templates take, where it has them as JSON text."""
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _call(inner)}
    try:
        return {**call, "arguments": parse_json(call["arguments"], dict, unique_keys=True)}
    except (KeyError, TypeError, ValueError):  # there are none, they are an object, or some other text
        return call


def _text(content: Any, where: str, what: str) -> str:
    """Return what a turn says: a text, or a list of text parts, of which each begins a line."""
    if not isinstance(content, list):
        return as_text(where, what, content)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f"{where}: {what} has a part that is no text ({shown(part)}); only text is trained on: remove the row"
            )
    lines = (as_text(where, f"{what} part {number}", part.get("text")) for number, part in enumerate(content, 1))
    return "\n".join(lines)


def _parsed(value: Any, where: str) -> Any:
    """Return a value that may be written as JSON text, as in a CSV file."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value, list, unique_keys=True)
    except ValueError as error:
        raise DataError(f"{where} is not a JSON list ({error}); correct it or remove the row") from None


def _objects(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"{where} must be a list of objects, got {shown(value)}; correct it or remove the row")
    return value

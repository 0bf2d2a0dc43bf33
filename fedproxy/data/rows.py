"""The one form of training data: a prompt the model reads and the target it should answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Message = Mapping[str, Any]
"""One turn: ``role`` (system, user, assistant or tool), ``content`` (text), and for tools ``tool_calls``, ``name`` and
``tool_call_id``."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One training example as text: a prompt with its target, a conversation, or a text without a prompt."""

    prompt: str
    """Text the model is given; no loss is taken on it. Of a conversation, what was said before the last answer."""
    target: str
    """Text the model should answer with, its leading delimiter included. Of a conversation, the last answer."""
    source: str
    """Name of the task or file that the row comes from."""
    key: str
    """Stable name of the row, e.g. ``arc_easy/train/17``; errors and partitions name rows by it."""
    label: int | str | None = None
    """Gold choice of a multiple-choice row, or what a file's column says, for partitions that skew labels."""
    ends: bool = False
    """Whether the answer is over where the target ends, so that the model should write its end token next."""
    messages: tuple[Message, ...] = ()
    """The turns of a conversation, the last of them an answer; the chat template makes a text of them."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that a conversation may call."""
    loss: Literal["target", "all"] = "target"
    """What the loss is taken on: the target, or all that it can be: every answer of a conversation, every token of a
    text without a prompt."""
    owner: str | None = None
    """Client that the row's own column names."""
    copies: int = 1
    """How many times the row stands in an epoch."""
    held_out: bool = False
    """Whether nobody trains on the row, so that its client can score models on it."""

    @property
    def is_text(self) -> bool:
        """Whether it is a text without a prompt."""
        return not self.messages and self.loss == "all"

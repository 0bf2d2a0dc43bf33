"""Examples as they are trained on: token ids with the ranges that loss is taken on, no longer than there is room."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedproxy.data.rows import Row

Spans = list[tuple[int, int]]

IGNORED = -100
"""Label of tokens that no loss is taken on, as in PyTorch and transformers."""


@dataclass(frozen=True)
class Example:
    """One tokenised row, and the tokens of it that the loss is taken on."""

    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """Ranges of target tokens, (first, behind the last), increasing and apart; none holds token 0, before which the
    model sees nothing."""
    key: str
    """Key of the row it was made from."""
    prompt_cut: bool = field(default=False, compare=False)
    """Whether the prompt lost tokens on its left."""
    target_cut: bool = field(default=False, compare=False)
    """Whether the target lost tokens on its right."""
    part: bool = field(default=False, compare=False)
    """Whether it is a window of a longer row."""

    @property
    def target_length(self) -> int:
        """Number of target tokens."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True)
class Lengths:
    """How long an example may be, and what becomes of a longer one."""

    max_input_tokens: int
    """Most prompt tokens of an example, at least 1."""
    max_target_tokens: int
    """Most target tokens of an example, the end token included, at least 1."""
    max_tokens: int | None = None
    """Most tokens of an example: the model's positions. None is no bound."""
    long_rows: str = "cut"
    """``cut``, ``split`` into windows (conversations and texts alone), or ``drop``."""
    apart: bool = False
    """Whether prompt and answer have their own limits in a conversation too, as where the answer alone is asked for."""

    @property
    def whole(self) -> int:
        """Most tokens of a conversation or a text."""
        most = self.max_input_tokens + self.max_target_tokens
        return most if self.max_tokens is None else min(most, self.max_tokens)


def fitted(row: Row, ids: list[int], spans: Spans, lengths: Lengths, before: Sequence[int | None]) -> list[Example]:
    """Return the examples of a row, each within the lengths.

    Args:
        row: The row.
        ids: Its tokens.
        spans: Ranges of target tokens.
        lengths: What there is room for.
        before: Special tokens in front of every text, which stay where anything of them has room behind them.
    """
    whole = (bool(row.messages) and not lengths.apart) or row.is_text
    first = spans[-1][0]
    most_input, most_target = _shares(len(ids), first, lengths, text=row.is_text, whole=whole)
    input_cut, target_cut = first > most_input, len(ids) - first > most_target
    lead = len(before) if ids[: len(before)] == list(before) else 0
    if not (input_cut or target_cut):
        return [Example(tuple(ids), tuple(spans), row.key)]
    if lengths.long_rows == "drop":
        return []
    if lengths.long_rows == "split" and whole:
        windows = _windows(ids, spans, lengths.whole, lead)
        return [Example(tuple(part), tuple(own), row.key, part=True) for part, own in windows]
    answer_end = first + min(len(ids) - first, most_target)
    kept = lead if lead < min(most_input, first) else 0
    gone = max(0, first - most_input)
    own = _shifted(spans, kept + gone, answer_end, gone)
    cut = ids[:kept] + ids[kept + gone : answer_end]
    return [Example(tuple(cut), tuple(own), row.key, input_cut, target_cut)]


def _shares(tokens: int, first: int, lengths: Lengths, *, text: bool, whole: bool) -> tuple[int, int]:
    """Return the most tokens before and from the last target on."""
    if text:
        return first, max(1, lengths.whole - first)
    most_input, most_target, most = lengths.max_input_tokens, lengths.max_target_tokens, lengths.max_tokens
    if whole:
        most_target = max(min(most_target, lengths.whole - 1), lengths.whole - first)
        return max(1, lengths.whole - min(tokens - first, most_target)), most_target
    if most is not None:
        most_target = min(most_target, most - 1)
        most_input = min(most_input, most - min(tokens - first, most_target))
    return most_input, most_target


def _shifted(spans: Sequence[tuple[int, int]], start: int, end: int, by: int) -> Spans:
    """Return what of spans lies between two places, moved to the left; nothing of it is the first token."""
    moved = [(max(start, first, by + 1) - by, min(end, last) - by) for first, last in spans]
    return [(first, last) for first, last in moved if first < last]


def _windows(ids: list[int], spans: Spans, size: int, lead: int) -> list[tuple[list[int], Spans]]:
    """Return a row in windows that each begin with its leading special tokens, or the last token of the one before.

    So every target stands in one window, behind another token. Windows without targets are left out.
    """
    lead = lead if lead < size else 0
    overlap = 0 if lead else 1
    room = size - lead
    found = []
    for start in range(lead, len(ids) - overlap, room - overlap):
        end = min(start + room, len(ids))
        own = _shifted(spans, start, end, start - lead)
        if own:
            found.append((ids[:lead] + ids[start:end], own))
    return found


def cut_counts(rows: Sequence[Row], examples: Sequence[Example]) -> dict[str, int]:
    """Return what became of rows.

    Args:
        rows: The rows.
        examples: What was made of them.

    Returns:
        How many were ``cut``, how many of them in their ``prompts``, and in their ``targets``, ``split`` and
        ``dropped``.
    """
    return {
        "cut": sum(example.prompt_cut or example.target_cut for example in examples),
        "prompts": sum(example.prompt_cut for example in examples),
        "targets": sum(example.target_cut for example in examples),
        "split": len({example.key for example in examples if example.part}),
        "dropped": len(rows) - len({example.key for example in examples}),
    }

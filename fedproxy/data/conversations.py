"""Conversations as tokens: framed by the tokenizer's chat template, with the answers' tokens told from the rest.

Where a template marks answers by ``{% generation %}``, its marks count. Elsewhere an answer is what the text of the
conversation up to it has more than the text before it, generation prompt included; that both are beginnings of the
whole text is checked, as some templates write earlier turns anew when later ones come.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedproxy.data.encoding import bare, encoding
from fedproxy.data.examples import Spans
from fedproxy.data.readers import LONGEST_TEXT
from fedproxy.data.rows import Message, Row
from fedproxy.errors import DataError, first_line, one_line

Rendered = tuple[str, Spans]
"""A template's text, and the characters that it marks as generated."""
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def conversation_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    """Return the tokens of a conversation, and the ranges of them that its loss is taken on.

    Args:
        row: A row with messages.
        tokenizer: The tokenizer; its chat template frames the row.

    Raises:
        DataError: If there is no template, it cannot render the row, or answers cannot be told in what it renders.
    """
    template = _template(row, tokenizer)
    text, parts = _marked(row, tokenizer) if _MARKED.search(template) else _compared(row, tokenizer)
    ids, spans = _token_spans(row, text, parts, tokenizer)
    found = [(max(start, 1), end) for start, end in spans if end > max(start, 1)]
    if not found:
        raise DataError(
            f"row {row.key}: {_named(template)} leaves no token of an answer; give it an answer, or use "
            "data.template=chatml"
        )
    return ids, found if row.loss == "all" else found[-1:]


def prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text that a model is given to write a conversation's last answer, and the text of that answer.

    A row that is no conversation has both already.

    Raises:
        DataError: As for :func:`conversation_tokens`.
    """
    if not row.messages:
        return row.prompt, row.target
    prompt = rendered(row, row.messages[:-1], tokenizer, asks=True)
    whole = rendered(row, row.messages, tokenizer)
    if not whole.startswith(prompt):
        raise _not_a_prefix(row, tokenizer)
    return prompt, whole[len(prompt) :]


def rendered(row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, asks: bool = False) -> str:
    """Return the text of turns of a row.

    Args:
        row: The row, with its tools.
        messages: Turns of it.
        tokenizer: The tokenizer with the chat template.
        asks: Whether the beginning of the next answer follows.

    Raises:
        DataError: If there is no template, or it cannot render them.
    """
    tools = list(row.tools) or None

    def render(turns: list[dict[str, Any]]) -> Rendered:
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=asks)
        return str(text), []

    with _rendering(row, tokenizer):
        text, _ = _in_its_form(messages, render)
    return _bounded(row, text, tokenizer)


def _in_its_form(messages: Sequence[Message], render: Callable[[list[dict[str, Any]]], Rendered]) -> Rendered:
    """Return what a template makes of turns: with the arguments of calls as objects, as transformers has it.

    A template that joins them to text, or prints them as Python would, gets them as JSON text.
    """
    turns = [dict(message) for message in messages]
    told = [{**turn, "tool_calls": [_told(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
            for turn in turns]  # fmt: skip
    if told == turns:
        return render(turns)
    try:
        found = render(turns)
    except Exception:
        return render(told)
    printed = any(str(arguments) in found[0] for turn in turns for arguments in _objects(turn) if arguments)
    return render(told) if printed else found


def _objects(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the arguments of a turn's calls that are objects."""
    calls = [call.get("function", call) for call in turn.get("tool_calls", ())]
    found = [call.get("arguments") for call in calls if isinstance(call, Mapping)]
    return [arguments for arguments in found if isinstance(arguments, Mapping)]


def _told(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call with its arguments as JSON text."""
    inner, arguments = call.get("function"), call.get("arguments")
    if isinstance(inner, Mapping):
        return {**call, "function": _told(inner)}
    told = isinstance(arguments, Mapping)
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if told else call


@contextmanager
def _rendering(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Make one line of what a template raises: it may raise what it likes."""
    template = _template(row, tokenizer)
    try:
        yield
    except Exception as error:
        raise DataError(
            f"row {row.key}: {_named(template)} cannot render it ({first_line(error)}); change or remove the row, or "
            "use data.template=chatml"
        ) from error


def _bounded(row: Row, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if len(text) > LONGEST_TEXT:
        named = _named(_template(row, tokenizer))
        raise DataError(f"row {row.key}: {named} makes more than {LONGEST_TEXT} characters of it; shorten it")
    return text


def _marked(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Spans]:
    """Return a conversation's text and the characters that its template marks as generated."""

    def render(turns: list[dict[str, Any]]) -> Rendered:
        texts, marks = render_jinja_template(
            conversations=[turns],
            tools=list(row.tools) or None,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return str(texts[0]), list(marks[0])

    with _rendering(row, tokenizer):
        text, parts = _in_its_form(row.messages, render)
    return _bounded(row, text, tokenizer), parts


def _compared(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Spans]:
    """Return a conversation's text and the characters of its answers, by comparison of beginnings."""
    text, parts = rendered(row, row.messages, tokenizer), []
    answers = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    for index in answers if row.loss == "all" else answers[-1:]:
        before = rendered(row, row.messages[:index], tokenizer, asks=True)
        after = text if index + 1 == len(row.messages) else rendered(row, row.messages[: index + 1], tokenizer)
        if not (after.startswith(before) and text.startswith(after)):
            raise _not_a_prefix(row, tokenizer)
        parts.append((len(before), len(after)))
    return text, parts


def _not_a_prefix(row: Row, tokenizer: PreTrainedTokenizerBase) -> DataError:
    return DataError(
        f"row {row.key}: {_named(_template(row, tokenizer))} writes turns anew when later ones come, so that answers "
        "cannot be told from it; mark them by {% generation %}, use data.template=chatml, or data.format.loss=last"
    )


def _token_spans(row: Row, text: str, parts: Spans, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    """Return a text's tokens and the ranges of them that end in the given characters."""
    if not tokenizer.is_fast:
        (ids,) = bare([text], tokenizer)
        begun = bare([text[:place] for part in parts for place in part], tokenizer)
        if any(ids[: len(head)] != head for head in begun):
            raise DataError(
                f"row {row.key}: the tokenizer joins an answer's first or last characters with those beside it, and "
                "has no offsets to tell them; use a fast tokenizer (tokenizer.json)"
            )
        places = [len(head) for head in begun]
        return ids, list(zip(places[::2], places[1::2], strict=True))
    with encoding():
        found = tokenizer(
            text,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
    offsets = list(found["offset_mapping"])
    ends = [end for _, end in offsets]
    spans = [(bisect_right(ends, start), bisect_right(ends, end)) for start, end in parts]
    # A token that an answer shares with what follows counts as the answer's.
    joined = [last < len(offsets) and offsets[last][0] < end for (_, last), (_, end) in zip(spans, parts, strict=True)]
    return list(found["input_ids"]), [
        (first, last + shared) for (first, last), shared in zip(spans, joined, strict=True)
    ]


def _template(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise DataError(
            f"row {row.key} is a conversation, and there is no chat template to frame it; use data.template=chatml"
        )
    return template


def _named(template: str) -> str:
    return f"the chat template {one_line(template, 30)!r}"

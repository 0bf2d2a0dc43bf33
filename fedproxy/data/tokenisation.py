"""Rows to token ids; prompts and targets are split exactly as lm-eval's Hugging Face models split them."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from fedproxy.data.conversations import conversation_tokens
from fedproxy.data.encoding import bare, encode, encoding, leading_tokens
from fedproxy.data.examples import Example, Lengths, Spans, cut_counts, fitted
from fedproxy.data.rows import Row
from fedproxy.errors import DataError

__all__ = ["Example", "cut_counts", "encode", "encoding", "leading_tokens", "tokenise"]


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_input_tokens: int,
    max_target_tokens: int,
    max_tokens: int | None = None,
    long_rows: str = "cut",
    apart: bool = False,
) -> list[Example]:
    """Tokenise rows as lm-eval scores them, so that tuning and scoring see the same tokens.

    White space that ends the prompt moves to the target, the pair is encoded as one text and split at the length of
    the encoded prompt. Special tokens that the tokenizer puts in front stay there, none where the text already begins
    with the beginning-of-sequence token; those that it puts at the end of a text are left out. A row without a prompt
    is conditioned on the first of these tokens (or on the end-of-sequence token where there is none). A row that ends
    (:attr:`Row.ends`) gets the end-of-sequence token, unless its target has it, as the last one of its target.

    A prompt that is too long loses tokens on its left, so that its answer cue stays; a target that is too long loses
    tokens on its right, its end token with them. Of a row that is still longer than the model's positions the prompt is
    cut first, to one token at least.

    A conversation is framed by the tokenizer's chat template (:mod:`fedproxy.data.conversations`), a text is encoded as
    it is. Either has at most as many tokens as a prompt and a target together. Of a longer conversation the last answer
    keeps what its share or the rest leaves room for, and what is before it is cut like a prompt; a longer text is cut
    on its right.

    Choice: a cut prompt keeps its leading beginning-of-sequence token, without which Llama and Gemma models degrade.

    Args:
        rows: The rows.
        tokenizer: The proxy's tokenizer.
        max_input_tokens: Most prompt tokens of an example, at least 1.
        max_target_tokens: Most target tokens of an example, the end token included, at least 1.
        max_tokens: Most tokens of an example: the model's positions. None is no bound.
        long_rows: What becomes of rows that are longer, see :class:`Lengths`.
        apart: Whether the limits of prompt and answer hold for a conversation one by one.

    Returns:
        One example per row, in the rows' order; none of a row that is dropped, several of one that is split.

    Raises:
        DataError: If a row has no target tokens, or none has room, its prompt is empty and the tokenizer has no token
            to put there, or its chat template does not fit.
    """
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"the model has {max_tokens} positions, and a prompt and its answer need 2; use another model")
    lengths = Lengths(max_input_tokens, max_target_tokens, max_tokens, long_rows, apart)
    before = leading_tokens(tokenizer)
    front = before or [tokenizer.bos_token_id]
    whole = zip(rows, _whole_tokens(rows, tokenizer, before), strict=True)
    return [example for row, (ids, spans) in whole for example in fitted(row, ids, spans, lengths, front)]


def _whole_tokens(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, before: Sequence[int]
) -> Iterator[tuple[list[int], Spans]]:
    """Yield all tokens of each row, and the ranges of its targets, with an end where the row has one."""
    answered = _pair_tokens([row for row in rows if not row.messages and not row.is_text], tokenizer, before)
    for row in rows:
        if row.messages:
            ids, spans = conversation_tokens(row, tokenizer)
        elif row.is_text:
            ids, spans = _text_tokens(row, tokenizer, before)
        else:
            ids, spans = next(answered)
        if row.ends and not _has_end(row, ids[spans[-1][0] : spans[-1][1]], tokenizer):
            end = spans[-1][1]
            ids, spans = [*ids[:end], int(tokenizer.eos_token_id)], [*spans[:-1], (spans[-1][0], end + 1)]
        yield ids, spans


def _pair_tokens(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, before: Sequence[int]
) -> Iterator[tuple[list[int], Spans]]:
    """Yield the tokens of each prompt with its target, and the range of the target's."""
    contexts = [row.prompt.rstrip() for row in rows]
    context_ids = encode(contexts, tokenizer, before)
    whole_ids = encode([row.prompt + row.target for row in rows], tokenizer, before)
    for row, context, prompt, whole in zip(rows, contexts, context_ids, whole_ids, strict=True):
        target = whole[len(prompt) :]
        if not context:
            prompt, target = _without_prompt(row, tokenizer, before)
        if not target:
            raise DataError(f"row {row.key}: its target has no tokens of its own; give it an answer or remove the row")
        yield [*prompt, *target], [(len(prompt), len(prompt) + len(target))]


def _text_tokens(row: Row, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> tuple[list[int], Spans]:
    """Return the tokens of a text: all are targets but those in front of it, or the first one."""
    (ids,) = encode([row.target], tokenizer, before)
    first = len(before) if before and ids[: len(before)] == list(before) else 0
    if len(ids) + row.ends <= max(first, 1):
        raise DataError(f"row {row.key}: its text has no token that another stands before; make it longer or remove it")
    return ids, [(max(first, 1), len(ids))]


def _without_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the one-token prompt that stands in for an empty one, and the target tokens."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, *before[:1])
    first = next((token for token in named if token is not None), None)
    if first is None:
        raise DataError(
            f"row {row.key}: its prompt is empty and the tokenizer has neither a beginning- nor an end-of-sequence "
            "token to stand in for it; give the row a prompt"
        )
    target = bare([row.prompt + row.target], tokenizer)[0]
    return [first], target[1:] if target[:1] == [first] else target


def _has_end(row: Row, target: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether nothing can be put at a target's end: it has the end token, or the tokenizer has none."""
    end, text = tokenizer.eos_token_id, tokenizer.eos_token
    if row.messages:
        return end is None or end in target
    return end is None or target[-1] == end or (bool(text) and row.target.rstrip().endswith(text))

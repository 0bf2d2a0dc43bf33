"""Rows to token ids, split into prompt and target exactly as lm-eval's Hugging Face models split them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from fedproxy.data.rows import Row
from fedproxy.errors import DataError, first_line


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

    @property
    def target_length(self) -> int:
        """Number of target tokens."""
        return sum(end - start for start, end in self.spans)


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_input_tokens: int,
    max_target_tokens: int,
    max_tokens: int | None = None,
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

    Choice: a cut prompt keeps its leading beginning-of-sequence token, without which Llama and Gemma models degrade.

    Args:
        rows: The rows.
        tokenizer: The proxy's tokenizer.
        max_input_tokens: Most prompt tokens of an example, at least 1.
        max_target_tokens: Most target tokens of an example, the end token included, at least 1.
        max_tokens: Most tokens of an example: the model's positions. None is no bound.

    Returns:
        One example per row, in the rows' order.

    Raises:
        DataError: If a row has no target tokens, or none has room, or its prompt is empty and the tokenizer has no
            token to put there.
    """
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"the model has {max_tokens} positions, and a prompt and its answer need 2; use another model")
    before = leading_tokens(tokenizer)
    contexts = [row.prompt.rstrip() for row in rows]
    context_ids = encode(contexts, tokenizer, before)
    whole_ids = encode([row.prompt + row.target for row in rows], tokenizer, before)
    examples = []
    for row, context, prompt, whole in zip(rows, contexts, context_ids, whole_ids, strict=True):
        target = whole[len(prompt) :]
        if not context:
            prompt, target = _without_prompt(row, tokenizer, before)
        if not target:
            raise DataError(f"row {row.key}: its target has no tokens of its own; give it an answer or remove the row")
        if row.ends and not _has_end(row, target, tokenizer):
            target = [*target, int(tokenizer.eos_token_id)]
        max_target = max_target_tokens if max_tokens is None else min(max_target_tokens, max_tokens - 1)
        answer = target[:max_target]
        max_input = max_input_tokens if max_tokens is None else min(max_input_tokens, max_tokens - len(answer))
        kept = _cut_left(prompt, max_input, before or [tokenizer.bos_token_id])
        ids = (*kept, *answer)
        spans = ((len(kept), len(ids)),)
        examples.append(Example(ids, spans, row.key, len(kept) < len(prompt), len(answer) < len(target)))
    return examples


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that a tokenizer puts in front of every text by default.

    They are found by encoding a text with and without them. Others stand at the text's end; those are not wanted, as a
    prompt does not end where its answer begins.
    """
    text = "a"
    with encoding():
        whole = [int(token) for token in tokenizer(text, padding=False, truncation=False)["input_ids"]]
    bare = _bare([text], tokenizer)[0]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start]
    special = set(tokenizer.all_special_ids)
    length = next((index for index, token in enumerate(whole) if token not in special), 0)
    return whole[:length]


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> list[list[int]]:
    """Encode each text behind the special tokens ``before``, which one that begins with the first one does not get."""
    first = tokenizer.bos_token or tokenizer.eos_token
    encoded = _bare(texts, tokenizer)
    for text, ids in zip(texts, encoded, strict=True):
        has_them = bool(first) and text.startswith(first)
        if before and not has_them and ids[: len(before)] != list(before):
            ids[:0] = before
    return encoded


@contextmanager
def encoding() -> Iterator[None]:
    """Make one line of what a tokenizer raises: one may fail at the first character that it does not know.

    Raises:
        DataError: In place of any other error.
    """
    try:
        yield
    except Exception as error:
        raise DataError(
            f"the tokenizer cannot encode a text ({first_line(error)}); put the model's own tokenizer into its folder, "
            "or give texts that it knows"
        ) from error


def cut_counts(examples: Sequence[Example]) -> dict[str, int]:
    """Return how many examples were ``cut``, how many of them in their ``prompts``, and in their ``targets``."""
    return {
        "cut": sum(example.prompt_cut or example.target_cut for example in examples),
        "prompts": sum(example.prompt_cut for example in examples),
        "targets": sum(example.target_cut for example in examples),
    }


def _bare(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode texts without special tokens, whole, whatever cutting and padding the tokenizer was saved with."""
    if not texts:
        return []
    with encoding():
        batch = tokenizer(
            list(texts), add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False
        )
    return [list(ids) for ids in batch["input_ids"]]


def _without_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the one-token prompt that stands in for an empty one, and the target tokens."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, *before[:1])
    first = next((token for token in named if token is not None), None)
    if first is None:
        raise DataError(
            f"row {row.key}: its prompt is empty and the tokenizer has neither a beginning- nor an end-of-sequence "
            "token to stand in for it; give the row a prompt"
        )
    target = _bare([row.prompt + row.target], tokenizer)[0]
    return [first], target[1:] if target[:1] == [first] else target


def _has_end(row: Row, target: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether nothing can be put at a target's end: it has the end token, or the tokenizer has none."""
    end, text = tokenizer.eos_token_id, tokenizer.eos_token
    return end is None or target[-1] == end or (bool(text) and row.target.rstrip().endswith(text))


def _cut_left(prompt: list[int], longest: int, before: Sequence[int | None]) -> list[int]:
    """Keep the end of a prompt, and its leading special tokens where more than these have room."""
    if len(prompt) <= longest:
        return prompt
    first = len(before) if prompt[: len(before)] == list(before) else 0
    if first < longest:
        return [*prompt[:first], *prompt[first - longest :]]
    return prompt[-longest:]

"""Rows to token ids, split into prompt and target exactly as lm-eval's Hugging Face models split them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fedproxy.data.rows import Row
from fedproxy.errors import DataError


@dataclass(frozen=True)
class Example:
    """One tokenised row: prompt tokens followed by target tokens."""

    input_ids: tuple[int, ...]
    prompt_length: int
    """How many leading tokens are prompt; the rest is the target that the loss is taken on."""
    key: str
    """Key of the row it was made from."""

    @property
    def target_length(self) -> int:
        """Number of target tokens."""
        return len(self.input_ids) - self.prompt_length


def tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_input_tokens: int, max_target_tokens: int
) -> list[Example]:
    """Tokenise rows as lm-eval scores them, so that tuning and scoring see the same tokens.

    White space that ends the prompt moves to the target, the pair is encoded as one text and split at the length of
    the encoded prompt. Special tokens are the tokenizer's default, none where the text already begins with the
    beginning-of-sequence token; a row without a prompt is conditioned on that token (or on the end-of-sequence token
    where there is none). A prompt that is too long loses tokens on its left, so that its answer cue stays; a target
    that is too long loses tokens on its right.

    Choice: a cut prompt keeps its leading beginning-of-sequence token, without which Llama and Gemma models degrade.

    Args:
        rows: The rows.
        tokenizer: The proxy's tokenizer.
        max_input_tokens: Most prompt tokens of an example, at least 1.
        max_target_tokens: Most target tokens of an example, at least 1.

    Returns:
        One example per row, in the rows' order.

    Raises:
        DataError: If a row has no target tokens, or an empty prompt and the tokenizer has no token to put there.
    """
    contexts, texts = [], []
    for row in rows:
        context = row.prompt.rstrip()
        contexts.append(context)
        texts.append(row.prompt + row.target)
    context_ids, whole_ids = _encode(contexts, tokenizer), _encode(texts, tokenizer)
    examples = []
    for row, context, prompt, whole in zip(rows, contexts, context_ids, whole_ids, strict=True):
        if context:
            target = whole[len(prompt) :]
        else:
            prompt, target = _without_prompt(row, tokenizer)
        if not target:
            raise DataError(f"row {row.key}: the target {row.target!r} has no tokens; give it an answer or drop it")
        prompt = _cut_left(prompt, max_input_tokens, tokenizer.bos_token_id)
        ids = (*prompt, *target[:max_target_tokens])
        examples.append(Example(ids, len(prompt), row.key))
    return examples


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode each text with the tokenizer's default special tokens, none where it begins with the first one."""
    prefix = tokenizer.bos_token or tokenizer.eos_token
    bare = [bool(prefix) and text.startswith(prefix) for text in texts]
    encoded: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        chosen = [index for index, is_bare in enumerate(bare) if is_bare is not special]
        if chosen:
            # Calling without the argument keeps the tokenizer's own default, which is not always True.
            options = {} if special else {"add_special_tokens": False}
            batch = tokenizer([texts[index] for index in chosen], return_attention_mask=False, **options)["input_ids"]
            for index, ids in zip(chosen, batch, strict=True):
                encoded[index] = list(ids)
    return encoded


def _without_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the one-token prompt that stands in for an empty one, and the target tokens."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError(
            f"row {row.key}: its prompt is empty and the tokenizer has neither a beginning- nor an end-of-sequence "
            "token to stand in for it; give the row a prompt"
        )
    target = tokenizer.encode(row.prompt + row.target, add_special_tokens=False)
    return [first], target[1:] if target[:1] == [first] else target


def _cut_left(prompt: list[int], longest: int, bos: int | None) -> list[int]:
    if len(prompt) <= longest:
        return prompt
    if bos is not None and prompt[0] == bos and longest > 1:
        return [bos, *prompt[1 - longest :]]
    return prompt[-longest:]

"""Texts to token ids: whole, whatever cutting, padding and special tokens a tokenizer was saved with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from fedproxy.errors import DataError, first_line


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that a tokenizer puts in front of every text by default.

    They are found by encoding a text with and without them. Others stand at the text's end; those are not wanted, as a
    prompt does not end where its answer begins.
    """
    text = "a"
    with encoding():
        whole = [int(token) for token in tokenizer(text, padding=False, truncation=False)["input_ids"]]
    inner = bare([text], tokenizer)[0]
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return whole[:start]
    special = set(tokenizer.all_special_ids)
    length = next((index for index, token in enumerate(whole) if token not in special), 0)
    return whole[:length]


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> list[list[int]]:
    """Encode each text behind the special tokens ``before``, which one that begins with the first one does not get."""
    first = tokenizer.bos_token or tokenizer.eos_token
    encoded = bare(texts, tokenizer)
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


@contextmanager
def as_it_was(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Give a tokenizer back the cutting and padding that it had before the context: a call's own stays in it.

    Saved with it, it would cut texts of whoever loads the file without transformers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = None if backend is None else (backend.truncation, backend.padding)
    try:
        yield
    finally:
        if backend is not None and before is not None:
            cutting, padding = before
            backend.no_truncation() if cutting is None else backend.enable_truncation(**cutting)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def bare(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode texts without special tokens, whole, whatever cutting and padding the tokenizer was saved with."""
    if not texts:
        return []
    with encoding():
        batch = tokenizer(
            list(texts), add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False
        )
    return [list(ids) for ids in batch["input_ids"]]

"""Greedy answers in batches: the same tokens that ``generate`` gives prompt by prompt, in fewer forwards."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from fedproxy.evaluation.decoding import SlotDecoder, Tokens, noise, read, token_bytes
from fedproxy.models.modes import evaluating


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    limits: Sequence[int],
    *,
    ends: Sequence[int],
    batch_tokens: int,
    stops: Callable[[list[int]], bool] = lambda tokens: False,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[list[int]], bool]:
    """Continue every prompt by the likeliest tokens, until an end token or its limit.

    Prompts are padded on their left and decoded side by side (:class:`~fedproxy.evaluation.decoding.SlotDecoder`), or
    by ``generate`` in batches where a model's cache does not suit that. Whether a model reads padding as nothing is
    tried on the shortest prompt beside a longer one; a model that does not gets its prompts one by one.

    Args:
        model: A causal language model on its device; its own settings for generation are not used.
        prompts: Token ids, none empty.
        limits: Most new tokens of each prompt.
        ends: Tokens that end an answer.
        batch_tokens: Most tokens that are read at once, padding included; a single prompt may have more.
        stops: Whether an answer of these tokens has ended as well; it may go on where ``generate`` makes it.
        progress: Called with the number of prompts that are done.

    Returns:
        New tokens of every prompt without the end token, and whether prompts could be put side by side.
    """
    if not prompts:
        return [], True
    ending = frozenset(ends)
    with _plain_settings(model), torch.inference_mode():
        together = _ignores_padding(model, prompts)
        size = token_bytes(model, prompts) if together and len(prompts) > 1 else None
        if size is not None:
            decoder = SlotDecoder(model, size, batch_tokens)
            over: Callable[[list[int]], bool] = lambda tokens: tokens[-1] in ending or stops(tokens)  # noqa: E731
            return [_before_end(row, ending) for row in decoder.answers(prompts, limits, over, progress)], True
        found: list[list[int]] = [[] for _ in prompts]
        done = 0
        order = sorted(range(len(prompts)), key=lambda index: (limits[index], len(prompts[index]), index))
        for batch in _batches(order, prompts, limits, batch_tokens if together else 1):
            answers = _answers(model, [prompts[index] for index in batch], limits[batch[0]], ending)
            for index, answer in zip(batch, answers, strict=True):
                found[index] = answer
            done += len(batch)
            progress(done)
    return found, together


def _batches(
    order: Sequence[int], prompts: Sequence[Tokens], limits: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Yield prompts in groups of one limit, each as large as ``batch_tokens`` allows."""
    batch: list[int] = []
    for index in order:
        grown = (len(batch) + 1) * (len(prompts[index]) + limits[index])
        if batch and (limits[index] != limits[batch[0]] or grown > batch_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _answers(model: PreTrainedModel, prompts: Sequence[Tokens], limit: int, ends: Collection[int]) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=list(ends) or None, pad_token_id=0
    )
    whole = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
    )
    return [_before_end(row, ends) for row in whole[:, longest:].tolist()]


def _before_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _ignores_padding(model: PreTrainedModel, prompts: Sequence[Tokens]) -> bool:
    """Tell whether the next token's logits are the same behind padding: tried on the shortest and a longer prompt."""
    if len(prompts) < 2:
        return True
    by_length = sorted(prompts, key=len)
    short, other = by_length[0], by_length[min(len(prompts) - 1, 8)]
    if len(short) == len(other):
        short = short[1:] or short
    try:
        alone, behind = (read(model, rows)[0].float() for rows in ([short], [short, other]))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a forward that takes no position ids or no mask may raise anything
        return False
    gap = (alone[0] - behind[0]).abs().max() / alone[0].std().clamp(min=1e-6)
    return bool(gap <= noise(model))


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's own defaults for generation aside (penalties, sampling, beams): they are not greedy search."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = before

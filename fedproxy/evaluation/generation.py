"""Greedy answers in batches: the same tokens that ``generate`` gives prompt by prompt, in fewer forwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

Tokens = Sequence[int]
_HALF_NOISE, _NOISE = 1e-1, 1e-3
"""Largest difference of logits that rounding makes, in their standard deviations: below float32, and in it."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    limits: Sequence[int],
    *,
    ends: Sequence[int],
    batch_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[list[int]], bool]:
    """Continue every prompt by the likeliest tokens, until an end token or its limit.

    Prompts of similar length are padded on their left into one batch. Whether a model reads such padding as nothing is
    tried on the shortest prompt beside a longer one; a model that does not gets its prompts one by one.

    Args:
        model: A causal language model on its device; its own settings for generation are not used.
        prompts: Token ids, none empty.
        limits: Most new tokens of each prompt.
        ends: Tokens that end an answer.
        batch_tokens: Most tokens of a batch, padding and answers included; a single prompt may have more.
        progress: Called with the number of prompts that are done.

    Returns:
        New tokens of every prompt without the end token, and whether batches were possible.
    """
    if not prompts:
        return [], True
    order = sorted(range(len(prompts)), key=lambda index: (limits[index], len(prompts[index]), index))
    together = _ignores_padding(model, prompts, order)
    found: list[list[int]] = [[] for _ in prompts]
    done = 0
    with _plain_settings(model):
        for batch in _batches(order, prompts, limits, batch_tokens if together else 1):
            answers = _answers(model, [prompts[index] for index in batch], limits[batch[0]], ends)
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


def _answers(model: PreTrainedModel, prompts: Sequence[Tokens], limit: int, ends: Sequence[int]) -> list[list[int]]:
    ids, mask = _padded(prompts, model.device)
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=list(ends) or None, pad_token_id=0
    )
    with torch.inference_mode():
        whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_before_end(row, ends) for row in whole[:, ids.shape[1] :].tolist()]


def _before_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _padded(prompts: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 (prompts, longest), padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _ignores_padding(model: PreTrainedModel, prompts: Sequence[Tokens], order: Sequence[int]) -> bool:
    """Tell whether the next token's logits are the same behind padding: tried on the shortest and a longer prompt."""
    if len(order) < 2:
        return True
    by_length = sorted(order, key=lambda index: (len(prompts[index]), index))
    short, other = prompts[by_length[0]], prompts[by_length[min(len(order) - 1, 8)]]
    if len(short) == len(other):
        short = short[1:] or short
    try:
        alone, behind = (_next_logits(model, rows) for rows in ([short], [short, other]))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a forward that takes no position ids or no mask may raise anything
        return False
    precise = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(alone.device.type)
    gap = (alone[0] - behind[0]).abs().max() / alone[0].std().clamp(min=1e-6)
    return bool(gap <= (_NOISE if precise else _HALF_NOISE))


def _next_logits(model: PreTrainedModel, prompts: Sequence[Tokens]) -> torch.Tensor:
    """Return the logits of the token after each prompt, float32 (prompts, vocabulary)."""
    ids, mask = _padded(prompts, model.device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1].float()
    return logits


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's own defaults for generation aside (penalties, sampling, beams): they are not greedy search."""
    before, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(training)

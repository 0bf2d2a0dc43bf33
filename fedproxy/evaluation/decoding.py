"""Greedy decoding in slots: a row that has ended makes room for the next prompt at once, and no cache is copied."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fedproxy.models.cache_name import CACHE

Tokens = Sequence[int]
SLOTS = 32
"""Most rows that are decoded together."""
_CACHE_BYTES = 2**29
"""Most bytes of keys and values, or a quarter of the model's own where that is more."""
_SPARE = 64
"""Columns by which a cache grows, and empty ones on the left of all rows that are worth a copy."""
_TRIED = 4
"""Tokens of an answer by which a model shows whether slots suit it."""
_HALF_NOISE, _NOISE = 1e-1, 1e-3
"""Largest difference of logits that rounding makes, in their standard deviations: below float32, and in it."""


@dataclass
class _Row:
    """A prompt in its slot, and the tokens that came so far."""

    index: int
    start: int
    """Column of its first token."""
    tokens: list[int] = field(default_factory=list)


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of all slots, (slots, heads, columns, width) each, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self._room = 0, [torch.empty(0), torch.empty(0)]

    def place(self, slots: Sequence[int], count: int, given: DynamicLayer) -> None:
        """Put rows that were read by themselves into slots, their last token in the last column.

        Args:
            slots: Where they go.
            count: Slots there are; a first call makes them.
            given: The rows' keys and values.
        """
        columns = given.keys.shape[-2]
        if not self.length:
            self.length = columns
            self._room = [_zeros(new, count, columns) for new in (given.keys, given.values)]
        for old, new in zip(self._room, (given.keys, given.values), strict=True):
            old[list(slots), :, self.length - columns : self.length] = new

    def keep(self, slots: Sequence[int], left: int) -> None:
        """Keep these slots alone, without the first ``left`` columns."""
        self._room = [part[list(slots), :, left:] for part in self._room]
        self.length -= left

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add one column to every slot."""
        if self.length == self._room[0].shape[-2]:
            self._room = [torch.cat([part, _zeros(part, len(part), 0)], dim=-2) for part in self._room]
        for part, new in zip(self._room, (key_states, value_states), strict=True):
            part[:, :, self.length : self.length + 1] = new
        self.length += 1
        keys, values = (part[:, :, : self.length] for part in self._room)
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many columns are filled."""
        return self.length


def _zeros(like: Tensor, count: int, columns: int) -> Tensor:
    """Return room for ``count`` slots of so many columns, and some to spare."""
    return like.new_zeros((count, like.shape[1], columns + _SPARE, like.shape[3]))


class SlotDecoder:
    """Continues prompts by the likeliest tokens, many at once.

    Prompts go in from the longest to the shortest, each read with others of about its length and then moved to the
    slots that are free. All rows end in the same column, so that a step is one forward over one new column.

    Args:
        model: A causal language model on its device, in eval mode, for which :func:`fits` holds.
        token_bytes: Bytes of keys and values of one token.
        batch_tokens: Most tokens that are read at once, padding included; a single prompt may have more.
    """

    def __init__(self, model: PreTrainedModel, token_bytes: int, batch_tokens: int) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self._most_tokens = most_cached(sum(own.nbytes for own in model.parameters())) // max(1, token_bytes)
        self._length, self._rows, self._cache = 0, list[_Row | None](), Cache(layers=[])

    def answers(
        self,
        prompts: Sequence[Tokens],
        limits: Sequence[int],
        ended: Callable[[list[int]], bool],
        progress: Callable[[int], None],
    ) -> list[list[int]]:
        """Return the new tokens of every prompt, up to the one after which it ended.

        Args:
            prompts: Token ids, none empty.
            limits: Most new tokens of each prompt.
            ended: Whether an answer of these tokens has ended.
            progress: Called with the number of prompts that are done.
        """
        found: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        done = 0
        for row, token in self._steps(prompts, limits, waiting):
            row.tokens.append(token)
            if len(row.tokens) >= limits[row.index] or ended(row.tokens):
                found[row.index] = row.tokens
                self._rows[self._rows.index(row)] = None
                progress(done := done + 1)
        return found

    def _steps(
        self, prompts: Sequence[Tokens], limits: Sequence[int], waiting: list[int]
    ) -> Iterator[tuple[_Row, int]]:
        """Yield every new token with its row; whoever reads them takes rows that have ended out of their slots."""
        while waiting or any(self._rows):
            if not any(self._rows):
                longest = len(prompts[waiting[-1]]) + max(limits[index] for index in waiting)
                slots = max(1, min(SLOTS, len(waiting), self._most_tokens // longest))
                self._length, self._rows, self._cache = 0, [None] * slots, Cache(layers=[])
            if waiting and self._rows.count(None) >= max(1, len(self._rows) // 4):
                yield from self._fill(prompts, waiting)
                continue
            self._tidy(bool(waiting))
            tokens = self._next()
            for slot, row in enumerate(self._rows):
                if row is not None:
                    yield row, tokens[slot]

    def _fill(self, prompts: Sequence[Tokens], waiting: list[int]) -> Iterator[tuple[_Row, int]]:
        """Read the longest prompts that fit, put them into free slots, and yield each one's first new token."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        width = len(prompts[waiting[-1]])
        count = max(1, min(len(free), len(waiting), self.batch_tokens // width))
        taken, slots = [waiting.pop() for _ in range(count)], free[:count]
        tokens, cache = read(self.model, [prompts[index] for index in taken])
        if not self._cache.layers:
            self._cache = Cache(layers=[_SlotLayer() for _ in cache.layers])
            self._length = width
        for layer, given in zip(self._cache.layers, cache.layers, strict=True):
            layer.place(slots, len(self._rows), given)
        for slot, index, token in zip(slots, taken, tokens.argmax(-1).tolist(), strict=True):
            row = self._rows[slot] = _Row(index, self._length - len(prompts[index]))
            yield row, token

    def _next(self) -> list[int]:
        """Return the next token of every slot; what an empty one says means nothing."""
        last = [0 if row is None else row.tokens[-1] for row in self._rows]
        starts = torch.tensor([self._length if row is None else row.start for row in self._rows])
        columns = torch.arange(self._length + 1)
        mask = (columns >= starts[:, None]).long()
        device = self.model.device
        logits = self.model(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=mask.to(device),
            position_ids=(self._length - starts)[:, None].to(device),
            use_cache=True,
            **{CACHE: self._cache},
        ).logits[:, -1]
        self._length += 1
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens

    def _tidy(self, more: bool) -> None:
        """Let go of columns on the left that no row reads, and of empty slots where nothing waits for them."""
        rows = [row for row in self._rows if row is not None]
        left = min(row.start for row in rows)
        slots = [slot for slot, row in enumerate(self._rows) if row is not None or more]
        if left < _SPARE and len(slots) > len(self._rows) // 2:
            return
        for layer in self._cache.layers:
            layer.keep(slots, left)
        self._rows, self._length = [self._rows[slot] for slot in slots], self._length - left
        for row in rows:
            row.start -= left


def most_cached(weights: int) -> int:
    """Return the most bytes of keys and values beside so many bytes of weights."""
    return max(_CACHE_BYTES, weights // 4)


def read(model: PreTrainedModel, prompts: Sequence[Tokens]) -> tuple[Tensor, Cache]:
    """Return the logits of the token after each prompt, (prompts, vocabulary), and the keys and values of all."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    options: dict[str, Any] = {"use_cache": True, CACHE: cache}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, **options).logits[:, -1]
    return logits, cache


def token_bytes(model: PreTrainedModel, prompts: Sequence[Tokens]) -> int | None:
    """Return the bytes of keys and values of one token; None for a model that slots do not suit.

    They suit a model that keeps keys and values of all tokens in all layers. Whether it takes them is tried on the
    shortest prompt and a longer one: each token must be the likeliest of a forward over that prompt alone.

    Args:
        model: A causal language model on its device, in eval mode, that reads nothing into padding.
        prompts: What it will be asked.
    """
    by_length = sorted(prompts, key=len)
    tried = [by_length[0], by_length[min(len(by_length) - 1, 8)]]
    try:
        _, cache = read(model, tried[:1])
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        size = sum(part[0, :, 0].nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        decoder = SlotDecoder(model, size, 1)  # one after the other: the second meets the first in its slots
        answers = decoder.answers(tried, [_TRIED, _TRIED], lambda tokens: False, lambda done: None)
        fits = all(_is_greedy(model, prompt, answer) for prompt, answer in zip(tried, answers, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a forward that does not take such a cache may raise anything
        return None
    return size if fits else None


def noise(model: PreTrainedModel) -> float:
    """Return the largest difference of logits that rounding makes, in their standard deviations."""
    precise = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(model.device.type)
    return _NOISE if precise else _HALF_NOISE


def _is_greedy(model: PreTrainedModel, prompt: Tokens, answer: Tokens) -> bool:
    """Tell whether each token of an answer is the likeliest one behind those before, but for rounding."""
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) :].float()
    chosen = logits.gather(-1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
    gaps = (logits.amax(-1) - chosen) / logits.std(-1).clamp(min=1e-6)
    return bool((gaps <= noise(model)).all())

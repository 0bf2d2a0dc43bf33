"""What distillation needs of a model: hidden states of real tokens, its output head alone, and a teacher of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError
from fedproxy.models.decoder import Decoder, hidden_state
from fedproxy.modules.divergence import CHUNK_ELEMENTS, Distribution, log_outcomes
from fedproxy.modules.teacher_cache import Entry, TeacherCache


def observe(model: PreTrainedModel, batch: Mapping[str, Tensor], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Run a model without its head and return hidden states of its real tokens.

    The last block's output is taken before the final norm, unlike the last of transformers' ``hidden_states``.

    Args:
        model: A causal language model.
        batch: ``input_ids`` and ``attention_mask``, int64 (batch, length), padded on the right.
        blocks: Indices of the blocks to look at.

    Returns:
        ``head``: what enters the output head, (tokens, hidden); ``block_<i>``: what block i puts out, (tokens, hidden).
        Tokens in row-major order, padding left out.
    """
    real = batch["attention_mask"].bool()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = hidden_state(output)[real]

        return hook

    decoder = Decoder.of(model)
    handles = [decoder.blocks[index].register_forward_hook(keep(f"block_{index}")) for index in blocks]
    try:
        # No real token of a causal model sees padding on the right, so no mask is needed.
        seen["head"] = decoder.body(input_ids=batch["input_ids"], use_cache=False)[0][real]
    finally:
        for handle in handles:
            handle.remove()
    return seen


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the entries of a model's vocabulary, padding entries included."""
    return int(model.get_output_embeddings().weight.shape[0])


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Check that a cache keeps no more tokens of a distribution than there are.

    Raises:
        ConfigError: If it does.
    """
    if not 1 <= top_k <= vocabulary:
        raise ConfigError(f"distillation.top_k must be in [1, {vocabulary}], the target's vocabulary, got {top_k}")


class Head:
    """A model's output head with all that its family does around it (soft-capping, scaling, bias), by its own code.

    The model's forward runs while its body is replaced by one that hands over given hidden states.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._body = Decoder.of(model).body
        self._token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        with torch.no_grad():
            self._output = self._body(input_ids=self._token, use_cache=False)

    @property
    def vocabulary(self) -> int:
        """Entries of the vocabulary, padding entries included."""
        return vocabulary_size(self.model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits (tokens, vocabulary) of hidden states that enter the head, (tokens, hidden)."""
        output = self._output
        output[next(iter(output))] = hidden.unsqueeze(0)
        before = self._body.__dict__.get("forward")
        self._body.forward = lambda *_, **__: output
        try:
            logits: Tensor = self.model(input_ids=self._token.to(hidden.device), use_cache=False).logits[0]
        finally:
            del self._body.forward
            if before is not None:
                self._body.forward = before
            output[next(iter(output))] = hidden.new_zeros(())
        return logits


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says about one batch."""

    distribution: Distribution | None
    """Its next-token distributions; None where they are not wanted."""
    blocks: Mapping[int, Tensor]
    """Hidden states (tokens, hidden) by block."""


class Teacher:
    """A frozen model that is asked about batches; what it says may come from a cache.

    Args:
        model: The model, in evaluation mode.
        blocks: Indices of its blocks to look at.
        temperature: Softens its distributions, > 0.
        distributions: Whether next-token distributions are wanted.
        cache: Keeps the likeliest tokens and hidden states, or None. The same is said whether an entry was there or is
            made now, so that a run does not depend on what its cache held.

    Raises:
        ConfigError: If the cache keeps more tokens than there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[int],
        *,
        temperature: float = 1.0,
        distributions: bool = True,
        cache: TeacherCache | None = None,
    ) -> None:
        self.model, self.blocks, self.temperature = model, tuple(blocks), temperature
        self.distributions, self.cache = distributions, cache
        self.head = Head(model)
        self.runs = 0
        """How often the model was run."""
        if cache is not None:
            check_top_k(cache.top_k, self.head.vocabulary)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Return what the teacher says about a batch of ``input_ids`` and ``attention_mask``."""
        if self.cache is None:
            seen = self._observe(batch, self.blocks)
            blocks = {index: seen[f"block_{index}"] for index in self.blocks}
            return TeacherOutputs(
                _Live(self.head, seen["head"], self.temperature) if self.distributions else None, blocks
            )
        keys = self.cache.keys(batch, self.blocks, self.temperature, self.distributions)
        parts = {part: entry for part, key in keys.items() if (entry := self.cache.read(key)) is not None}
        missing = [part for part in keys if part not in parts]
        if missing:
            for part, entry in self._entries(batch, missing).items():
                self.cache.write(keys[part], entry)
                parts[part] = entry
        entry = Entry.joined(parts.values()).to(batch["input_ids"].device)
        stored = None if entry.log_p is None or entry.index is None else _Stored(entry.log_p, entry.index)
        return TeacherOutputs(stored, {index: entry.hidden(index) for index in self.blocks})

    def _observe(self, batch: Mapping[str, Tensor], blocks: Sequence[int]) -> dict[str, Tensor]:
        self.runs += 1
        return observe(self.model, batch, blocks)

    def _entries(self, batch: Mapping[str, Tensor], parts: Sequence[int | None]) -> dict[int | None, Entry]:
        """Return entries, made in one run of the model: of blocks, and of the distributions under None."""
        assert self.cache is not None
        blocks = [part for part in parts if part is not None]
        seen = self._observe(batch, blocks)
        made: dict[int | None, Entry] = {
            block: Entry.of(None, None, {block: seen[f"block_{block}"]}) for block in blocks
        }
        if None in parts:
            made[None] = Entry.of(*_likeliest(self.head, seen["head"], self.cache.top_k, self.temperature), {})
        return made


def _likeliest(head: Head, hidden: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the ``count`` likeliest tokens, int64 (tokens, count), and their :func:`log_outcomes`."""
    indices, values = [], []
    for part in torch.split(hidden, max(1, CHUNK_ELEMENTS // head.vocabulary)):
        logits = head(part)
        index = logits.topk(count, dim=-1).indices
        indices.append(index)
        values.append(log_outcomes(logits, index, temperature))
    return torch.cat(indices), torch.cat(values)


@dataclass(frozen=True)
class _Live:
    """Distributions over the whole vocabulary, computed when read."""

    head: Head
    hidden: Tensor
    temperature: float

    @torch.no_grad()
    def outcomes(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return log_outcomes(self.head(self.hidden[start:stop]), None, self.temperature), None


@dataclass(frozen=True)
class _Stored:
    """Distributions over the likeliest tokens and the rest."""

    log_p: Tensor
    index: Tensor

    def outcomes(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.log_p[start:stop], self.index[start:stop].long()

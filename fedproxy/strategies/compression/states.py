"""Streaming public text through a decoder and looking at what each block is given and what it gives."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedproxy.errors import DataError
from fedproxy.models import Decoder
from fedproxy.models.decoder import hidden_state
from fedproxy.strategies.compression.base import Batch

Watcher = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with (block, its input, its output, mask): two times (batch, tokens, hidden), and int64 (batch, tokens)."""


@torch.no_grad()
def watch_blocks(decoder: Decoder, calibration: Iterable[Batch], watch: Watcher) -> int:
    """Run every batch through the body, without the head, and show each block's input and output to ``watch``.

    Hidden states live no longer than ``watch`` keeps them: two at a time where it keeps none. The last block's output
    comes before the final norm.

    Returns:
        Number of real tokens.

    Raises:
        DataError: If the text holds no token.
    """
    tokens, device = 0, decoder.model.device
    current: list[Tensor] = []
    leading = hasattr(decoder.model.config.get_text_config(), "altup_num_inputs")

    def hook(index: int) -> Any:
        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before: Tensor = args[0] if args else kwargs["hidden_states"]
            mask = current[0]
            watch(index, _by_token(before, mask, leading), _by_token(hidden_state(output), mask, leading), mask)

        return show

    handles = [block.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(decoder.blocks)]
    try:
        for batch in calibration:
            ids, mask = _unpack(batch, device)
            current[:] = [mask]
            tokens += int(mask.sum())
            decoder.body(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise DataError("compression.calibration: the text holds no token; give rows with text")
    return tokens


def _by_token(states: Tensor, mask: Tensor, leading: bool) -> Tensor:
    """Return hidden states as (batch, tokens, features), where a family has several streams of them one after another.

    Args:
        states: (batch, tokens, hidden), (streams, batch, tokens, hidden) or (batch, tokens, streams, hidden).
        mask: (batch, tokens).
        leading: Whether it is the second of these (Gemma 3n) and not the third (hyper-connections).
    """
    if states.ndim <= mask.ndim + 1:
        return states
    return (states.movedim(0, -2) if leading else states).flatten(mask.ndim)


def _unpack(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        ids = batch["input_ids"].to(device)
        mask = batch.get("attention_mask")
        return ids, torch.ones_like(ids) if mask is None else mask.to(device)
    return batch.to(device), torch.ones_like(batch, device=device)

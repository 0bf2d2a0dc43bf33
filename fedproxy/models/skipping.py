"""Running a model without some of its blocks, weights and all else left in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedproxy.models.decoder import Decoder


@contextmanager
def skipping(decoder: Decoder, skipped: Sequence[int]) -> Iterator[None]:
    """Let these blocks hand on what they are given for the length of the context; run without a cache meanwhile."""
    blocks = [decoder.blocks[index] for index in skipped]
    tuples = _give_tuples(decoder, blocks) if blocks else False
    for block in blocks:
        block.forward = _identity(tuples)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is seen again


def _identity(tuples: bool) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if tuples else hidden

    return forward


@torch.no_grad()
def _give_tuples(decoder: Decoder, blocks: Sequence[nn.Module]) -> bool:
    """Say whether blocks return a tuple around their hidden state, seen in a pass over one token."""
    kinds: list[bool] = []
    handle = blocks[0].register_forward_hook(lambda _, __, output: kinds.append(not isinstance(output, Tensor)))
    try:
        ids = torch.zeros((1, 1), dtype=torch.long, device=decoder.model.device)
        decoder.body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return kinds[0]

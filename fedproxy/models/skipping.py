"""Running a model without some of its blocks, weights and all else left in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.errors import ModelError
from fedproxy.models.decoder import Decoder

_PROBE_TOKENS = 8


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
    handle = blocks[0].register_forward_hook(lambda _, __, output: kinds.append(isinstance(output, tuple)))
    try:
        ids = torch.zeros((1, 1), dtype=torch.long, device=decoder.model.device)
        decoder.body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return kinds[0]


@torch.no_grad()
def check_subset(decoder: Decoder, shallow: PreTrainedModel, kept: Sequence[int]) -> None:
    """Check on a few tokens that a model of the blocks ``kept`` computes what the whole one does without the others.

    Families in which a block's work depends on its position in a way that its configuration does not say would
    otherwise give a silently broken proxy.

    Raises:
        ModelError: If the two differ.
    """
    vocabulary = decoder.model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=decoder.model.device)[None] % vocabulary
    mask = torch.ones_like(ids)
    with skipping(decoder, sorted(set(range(len(decoder))) - set(kept))):
        expected = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    found = shallow(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    allowed = (1e-4 if decoder.model.dtype == torch.float32 else 5e-2) * float(expected.abs().max().clamp_min(1e-6))
    worst = float((found - expected).abs().max())
    if not worst <= allowed:  # not a number is no agreement
        raise ModelError(
            f"{type(decoder.model).__name__}: its blocks work differently in another place (logits differ by "
            f"{worst:.2g}), so that blocks cannot be removed; choose compression.name=none"
        )

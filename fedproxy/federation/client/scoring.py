"""What a client's held-out rows say of a model, as sums and counts."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from fedproxy.data.batching import collate
from fedproxy.data.examples import IGNORED
from fedproxy.data.tokenisation import Example
from fedproxy.models import placed
from fedproxy.models.modes import evaluating
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.devices import training_device
from fedproxy.modules.losses import answer_nll
from fedproxy.modules.trainer import autocast_dtype
from fedproxy.processes import rank_and_size

_ROWS = 16
"""Rows of a forward pass."""


@torch.no_grad()
def answer_sums(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, trainer: Mapping[str, Any]
) -> dict[str, tuple[float, int]]:
    """Score a model; its training mode and its device are left as they were.

    Args:
        model: The model.
        examples: Held-out rows, tokenised.
        pad_id: Token that fills up short examples.
        trainer: Options of lightning.Trainer, whose device and precision are taken.

    Returns:
        ``answer_nll``, nats summed over all answer tokens, with their number; and ``row_nll``, each row's mean over its
        answer tokens, summed over rows, with their number.
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    by_token, by_row, tokens = list[float](), list[float](), 0
    dtype = autocast_dtype(trainer)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if rank_and_size()[1] == 1 and not getattr(model, "is_quantized", False):  # else it is where it belongs
            stack.enter_context(placed(model, training_device(trainer)))
        stack.enter_context(torch.autocast(model.device.type, dtype, enabled=dtype is not None))
        for start in range(0, len(ordered), _ROWS):
            batch = {
                name: tensor.to(model.device)
                for name, tensor in collate(ordered[start : start + _ROWS], pad_id).items()
            }
            nll = answer_nll(*answer_logits(model, batch)).double().cpu()
            counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
            by_token.append(float(nll.sum()))
            by_row += [float(row.mean()) for row in torch.split(nll, counts)]
            tokens += sum(counts)
    return {"answer_nll": (math.fsum(by_token), tokens), "row_nll": (math.fsum(by_row), len(by_row))}

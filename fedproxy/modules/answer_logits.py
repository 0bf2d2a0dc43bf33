"""Logits at answer positions only, equal to those of the full forward pass for every decoder family."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.data.examples import IGNORED


def answer_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a model and return the logits that predict the labelled tokens, and those tokens.

    The model's own forward runs unchanged; a hook on its output head hands the head only the hidden states that come
    one position before a labelled token. Whatever a family does around its head (soft-capping, scaling, a bias, a
    projection) is therefore done by its own code. A family that multiplies by the head's weight without calling the
    head gives all logits, and the answers are picked from these.

    Right padding is never attended to by a real token of a causal model, so a mask that only hides right padding is
    left out: attention then runs without a materialised mask.

    Args:
        model: A causal language model.
        batch: ``input_ids``, ``labels`` (-100 where no loss is taken) and optionally ``attention_mask``, or the
            ``position_ids`` of rows that share a sequence (:func:`fedproxy.data.packing.pack`), each int64
            (batch, length).

    Returns:
        Logits (answers, vocabulary) and targets int64 (answers), answers in row-major order of the batch.
    """
    labels = batch["labels"]
    shape = labels.shape
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = labels[rows, columns + 1]
    gathered = False

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        nonlocal gathered
        hidden = inputs[0]
        if hidden.ndim != 3 or hidden.shape[:2] != shape:
            return None
        gathered = True
        return hidden[rows, columns].unsqueeze(0), *inputs[1:]

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(gather)
    given = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    mask = _needed_mask(batch)
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, **given).logits
    finally:
        if handle is not None:
            handle.remove()
    return (logits[0] if gathered else logits[rows, columns]), targets


def _needed_mask(batch: dict[str, Tensor]) -> Tensor | None:
    """Return the attention mask, or None where it hides right padding alone."""
    mask = batch.get("attention_mask")
    if mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all() & (mask[:, 0] == 1).all()):
        return None
    return torch.as_tensor(mask)

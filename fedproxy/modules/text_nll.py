"""How likely a model finds plain text."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.data.examples import IGNORED
from fedproxy.errors import DataError
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll


@torch.no_grad()
def text_nll(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the mean negative log-likelihood over all tokens but each text's first, nats per token.

    Args:
        model: A causal language model; logits of one batch at a time are held.
        batches: ``input_ids`` and ``attention_mask``, int64 (batch, tokens), padded on the right.

    Raises:
        DataError: If no text has a second token.
    """
    total, count = 0.0, 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        labels = ids.masked_fill(mask == 0, IGNORED)
        logits, targets = answer_logits(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        total += float(answer_nll(logits, targets).sum(dtype=torch.float64))
        count += len(targets)
    if not count:
        raise DataError("compression.calibration: the text holds no token to judge models on; give longer rows")
    return total / count

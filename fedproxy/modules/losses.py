"""Pure losses of the LightningModules."""

import torch.nn.functional as F
from torch import Tensor


def answer_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target token, float32 (answers).

    It is taken in the log domain, so a confident wrong answer costs its logit gap and is never infinite.

    Args:
        logits: (answers, vocabulary).
        targets: int64 (answers).
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")

"""Pure losses of the LightningModules."""

import torch
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


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of ||E(x) - E*(x)||^2 / RMS(E(x))^2 per hidden unit, 0-dim float32.

    Offsite-Tuning's distillation loss (Xiao et al. 2023, arXiv 2302.04870) with E the teacher. Choice: the root mean
    square is taken per token, because a few tokens (the first above all) are a hundred times longer than the rest and
    would hide them.

    Args:
        student: E*(x), hidden states (tokens, hidden).
        teacher: E(x), hidden states (tokens, hidden), without gradient.
    """
    teacher = teacher.float()
    power = teacher.square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student.float() - teacher).square().mean(dim=-1) / power).mean()

"""Metrics over answer tokens that add up over batches and processes."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

# Sums over many batches need float64, which Apple's GPUs lack.
_SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


def step_mean() -> MeanMetric:
    """Return a mean over the steps of a fit that never makes the device wait, summed in float64 where there is one."""
    return MeanMetric(nan_strategy="disable").set_dtype(_SUM_DTYPE)


class AnswerPerplexity(Metric):  # type: ignore[misc]
    """Perplexity of answer tokens, exp(mean negative log-likelihood), summed in the log domain.

    :meth:`update` takes negative log-likelihoods (answers) in nats per token; logits [200, 0, 0] with target 1 count
    as 200 nats, where a softmax followed by a log would give infinity.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=_SUM_DTYPE), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """Add the negative log-likelihoods of a batch."""
        self.nll += nll.detach().sum(dtype=self.nll.dtype)
        self.count += nll.numel()

    def compute(self) -> Tensor:
        """Return the perplexity; infinite only where its logarithm passes what a float64 can hold."""
        return torch.exp(self.mean_nll())

    def mean_nll(self) -> Tensor:
        """Return the mean negative log-likelihood, nats per token."""
        return torch.as_tensor(self.nll / self.count)


class AnswerAccuracy(Metric):  # type: ignore[misc]
    """Share of answer tokens that have the highest logit."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (answers, vocabulary), targets int64 (answers)."""
        self.correct += (logits.detach().argmax(dim=-1) == targets).sum()
        self.count += targets.numel()

    def compute(self) -> Tensor:
        """Return the accuracy in [0, 1]."""
        return torch.as_tensor(self.correct / self.count)

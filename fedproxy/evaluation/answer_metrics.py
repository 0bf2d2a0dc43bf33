"""What the choices' log-likelihoods say beyond accuracy: gold-answer NLL, margin and calibration, as torchmetrics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryCalibrationError


class AnswerNLL(Metric):  # type: ignore[misc]
    """Negative log-likelihood of the gold answer per answer token, in nats: sum of NLL over sum of tokens."""

    higher_is_better = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loglikelihoods: Tensor, gold: int, tokens: int) -> None:
        """Add one question: ``loglikelihoods`` (choices,), the gold choice and its number of tokens."""
        self.nll -= loglikelihoods[gold]
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return nats per gold-answer token."""
        return self.nll / self.tokens


class AnswerNLLTotal(MeanMetric):  # type: ignore[misc]
    """Mean negative log-likelihood of the whole gold answer, in nats."""

    higher_is_better = False

    def update(self, loglikelihoods: Tensor, gold: int, tokens: int) -> None:
        """Add one question; see :class:`AnswerNLL`."""
        super().update(-loglikelihoods[gold])


class Margin(MeanMetric):  # type: ignore[misc]
    """Mean probability of the gold choice minus the best other choice's, in [-1, 1].

    Probabilities are the softmax over the choices' summed log-likelihoods, the same that ``acc`` picks the largest of.
    """

    higher_is_better = True

    def update(self, loglikelihoods: Tensor, gold: int, tokens: int) -> None:
        """Add one question; see :class:`AnswerNLL`."""
        super().update(choice_margin(loglikelihoods, gold))


class ChoiceCalibrationError(BinaryCalibrationError):  # type: ignore[misc]
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, Eq 3), 15 equal bins of the top probability."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_bins=15, norm="l1", **kwargs)

    def update(self, loglikelihoods: Tensor, gold: int, tokens: int) -> None:
        """Add one question; see :class:`AnswerNLL`."""
        confidence, choice = loglikelihoods.softmax(-1).max(-1)
        super().update(confidence.reshape(1), (choice == gold).long().reshape(1))


def choice_margin(loglikelihoods: Tensor, gold: int) -> Tensor:
    """Return the gold choice's probability minus the largest other, for log-likelihoods of shape (choices,)."""
    probabilities = loglikelihoods.softmax(-1)
    others = torch.cat([probabilities[:gold], probabilities[gold + 1 :]])
    return probabilities[gold] - others.max()


def answer_metrics() -> MetricCollection:
    """Return fresh metrics, named as in reports; each is updated with (loglikelihoods, gold, tokens) per question."""
    return MetricCollection(
        {
            "answer_nll": AnswerNLL(),
            "answer_nll_total": AnswerNLLTotal(),
            "margin": Margin(),
            "ece": ChoiceCalibrationError(),
        },
        compute_groups=False,
    )


def score_answers(questions: Sequence[tuple[Sequence[float], int, int]]) -> dict[str, float]:
    """Return the metrics over ``questions`` of (log-likelihood per choice, gold choice, gold-answer tokens)."""
    metrics = answer_metrics()
    for loglikelihoods, gold, tokens in questions:
        metrics.update(torch.tensor(loglikelihoods, dtype=torch.float64), gold, tokens)
    return {name: float(value) for name, value in metrics.compute().items()}

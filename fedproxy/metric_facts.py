"""What a reader of scores must know of a metric: which way is better, and whether it is a share.

Evaluators say it of metrics of their own (:func:`declare`). A metric that nobody declared is shown as a plain number.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    higher_is_better: bool = True
    share: bool = True
    """Whether it lies in [0, 1] and is shown in per cent."""


_KNOWN: dict[str, Metric] = {}


def declare(*metrics: Metric) -> None:
    """Make metrics known; one of the same name is replaced."""
    _KNOWN.update({metric.name: metric for metric in metrics})


def facts(name: str) -> Metric:
    """Return what is known of a metric; lm-eval's name of a filter, behind a colon, does not matter."""
    plain = name.partition(":")[0]
    return _KNOWN.get(plain) or Metric(plain, share=False)


def headline_of(candidates: Iterable[str]) -> str | None:
    """Return the metric that scores are shown and compared by: the first of :data:`HEADLINES` among ``candidates``."""
    found = set(candidates)
    return next((name for name in HEADLINES if name in found), None)


HEADLINES = ("acc_norm", "acc", "answer_nll", "exact_match", "f1", "em", "rouge_l")
"""Metrics by which models can be compared, the first that all scores have in common."""

declare(
    *(Metric(name) for name in ("acc_norm", "acc", "exact_match", "f1", "em", "rouge_l", "mcc", "rouge1", "rougeL")),
    *(Metric(name, share=False) for name in ("margin", "bleu")),
    *(Metric(name, False, share=False) for name in ("answer_nll", "answer_nll_total", "perplexity")),
    *(Metric(name, False, share=False) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    Metric("ece", higher_is_better=False),
)

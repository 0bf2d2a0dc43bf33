"""The one form of training data: a prompt the model reads and the target it should answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One training example as text."""

    prompt: str
    """Text the model is given; no loss is taken on it."""
    target: str
    """Text the model should answer with, its leading delimiter included."""
    source: str
    """Name of the task or file that the row comes from."""
    key: str
    """Stable name of the row, e.g. ``arc_easy/train/17``; errors and partitions name rows by it."""
    label: int | None = None
    """Gold choice of a multiple-choice row, for partitions that skew labels."""
    ends: bool = False
    """Whether the answer is over where the target ends, so that the model should write its end token next."""

"""How the learning rate goes from step to step: constant, linear or cosine, over all rounds or in each anew."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedproxy.registry import Component


@dataclass(frozen=True)
class Schedule(Component, ABC, family="client.schedule"):
    """Base of learning-rate schedules: a warm-up from 0, then what a member says.

    Step for step the rates are those of transformers' scheduler of the same name, the first one (0 under a warm-up)
    included. A client's place is known from the round's number: it has done as many steps in each round before as it
    does in this one, also in rounds for which it was not drawn, so that all clients of a round are equally far.
    """

    decays: ClassVar[bool] = True
    """Whether the rate depends on how many steps there are."""

    over: Literal["rounds", "round"] = "rounds"
    """One schedule over a client's steps of all rounds, or the whole schedule again in each round."""
    warmup: float = 0.0
    """Steps of a linear warm-up from 0, or, below 1, their share of all steps (of the run or the round, see over)."""

    def __post_init__(self) -> None:
        """Check the options."""
        share, steps = 0 <= self.warmup < 1, self.warmup >= 1 and self.warmup == int(self.warmup)
        self.require("warmup", share or steps, "a share of the steps from 0 to below 1, or a whole number of steps")

    @property
    def needs_rounds(self) -> bool:
        """Whether a rate depends on how many rounds the run has."""
        return self.over == "rounds" and (self.decays or 0 < self.warmup < 1)

    def warmup_steps(self, total: int) -> int:
        """Return the warm-up's steps; a share is rounded up, as transformers does."""
        return math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)

    def factor(self, step: int, total: int, lr: float) -> float:
        """Return the part of the full rate that a step has, in [0, 1].

        Args:
            step: The step, from 0.
            total: All steps.
            lr: The full rate.
        """
        warm = self.warmup_steps(total)
        return step / warm if step < warm else self.after_warmup(step - warm, total - warm, lr)

    @abstractmethod
    def after_warmup(self, step: int, total: int, lr: float) -> float:
        """Return the part of the full rate ``lr`` that a step has, both counts without the warm-up."""

    def in_round(self, number: int, *, rounds: int, steps: int, lr: float) -> Callable[[int], float]:
        """Return what gives the part of the full rate at each of a client's steps in a round.

        Args:
            number: The round, from 1.
            rounds: All rounds of the run.
            steps: The client's steps in a round.
            lr: The full rate.
        """
        first, total = ((number - 1) * steps, rounds * steps) if self.over == "rounds" else (0, steps)
        return lambda step: self.factor(first + step, total, lr)


@dataclass(frozen=True)
class Constant(Schedule, name="constant"):
    """The same rate in every step after the warm-up."""

    decays: ClassVar[bool] = False

    def after_warmup(self, step: int, total: int, lr: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Decaying(Schedule, ABC):
    """Base of schedules that end at a least rate."""

    min_lr: float = 0.0
    """Rate that the decay ends at."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require("min_lr", self.min_lr >= 0, "at least 0")

    def after_warmup(self, step: int, total: int, lr: float) -> float:
        """Return the decay between full and least rate."""
        least = self.min_lr / lr
        return self.decay(min(step, total), max(1, total)) * (1 - least) + least

    @abstractmethod
    def decay(self, step: int, total: int) -> float:
        """Return what is left of the way from full to least rate, in [0, 1]."""


@dataclass(frozen=True)
class Linear(Decaying, name="linear"):
    """The rate falls by the same amount in every step after the warm-up."""

    def decay(self, step: int, total: int) -> float:
        """Return the part of the steps that is left."""
        return max(0, total - step) / total


@dataclass(frozen=True)
class Cosine(Decaying, name="cosine"):
    """The rate falls along half a cosine after the warm-up (Loshchilov and Hutter 2017, arXiv 1608.03983)."""

    def decay(self, step: int, total: int) -> float:
        """Return (1 + cos(pi step / total)) / 2."""
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step / total))))

"""Each update clipped to a norm and noised at the client, before anything else sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.round_parts.base import ClientRound, RoundPart

_MOST_NOISE = 1e4
"""Largest standard deviation of the noise: no update with more of it would be taken."""


@dataclass(frozen=True)
class ClipNoise(RoundPart, name="clip_noise"):
    """Scales an update down to a norm of at most ``clip`` and adds Gaussian noise of standard deviation noise * clip.

    The Gaussian mechanism at client level (McMahan et al. 2018, arXiv 1710.06963), with the noise at the client. The
    draws come from the run's seed, the round and the client, so that a run can be repeated: they hide nothing from a
    server that knows the seed, and nothing is accounted for here: the node ``privacy`` does both.
    """

    order: ClassVar[int] = 80
    optional: ClassVar[bool] = True

    clip: float = 1.0
    """Largest L2 norm of a whole update, > 0."""
    noise: float = 0.0
    """Noise multiplier z, at least 0: the standard deviation in units of ``clip``."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("clip", self.clip > 0, "positive")
        self.require("noise", self.noise >= 0, "at least 0")
        self.require("noise", self.noise * self.clip <= _MOST_NOISE, f"at most {_MOST_NOISE:g} / clip")

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Clip and noise the update."""
        clipped = clip(update.delta, self.clip)
        if self.noise:
            draws = task.generator("noise")
            clipped = {n: t + _normal(t, draws) * (self.noise * self.clip) for n, t in sorted(clipped.items())}
        return replace(update, delta=clipped)


def norm(delta: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of an update over all of its tensors."""
    squares = [torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2 for tensor in delta.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def clip(delta: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Return an update scaled down to an L2 norm of at most ``bound`` over all of its tensors; shorter ones stay."""
    length = norm(delta)
    return dict(delta) if length <= bound else {name: tensor * (bound / length) for name, tensor in delta.items()}


def _normal(like: Tensor, draws: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draws, dtype=torch.float32).to(like.dtype)

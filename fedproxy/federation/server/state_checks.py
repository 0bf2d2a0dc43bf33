"""What a round leaves is checked before it is saved: a state that nobody can train from would end every resume.

The bound needs no other client to compare with, so that it holds with one client a round, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedproxy.errors import ClientError
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.protocol import Tensors
from fedproxy.strategies.aggregators import Aggregation

LARGEST_WEIGHT = 1e6
"""Largest size of a trained weight: far above any that trains, far below what overflows in a product."""


@dataclass(frozen=True)
class StateCheck:
    """Checks the results of one round."""

    round: int
    rule: str
    """Name of the aggregation rule."""
    optimizer: str
    """Name of the server optimizer."""
    max_growth: float | None
    """Largest multiple of the norm that the state had before the round; None checks no growth."""
    norms: Mapping[str, float]
    """The updates' norms by client, for errors."""

    def merged(self, merged: Aggregation) -> None:
        """Check what the rule gave.

        Raises:
            ClientError: Naming the rule and a tensor that is not finite, or frozen weights that would move too far.
        """
        groups: Mapping[str, Tensors] = {
            "the merged update": merged.delta,
            "the conflict map": merged.conflict or {},
            "the rule's memory": merged.memory,
            "the change of the frozen weights": merged.base_change,
        }
        self._finite(groups, f"aggregator.name={self.rule} gave NaN or infinity")
        self._bounded(merged.base_change, "the change of the frozen weights")

    def moved(self, before: Tensors, after: Tensors, memory: Tensors) -> None:
        """Check the state after the server optimizer's step.

        Args:
            before: The state that the round began with.
            after: The state now.
            memory: The optimizer's moments.

        Raises:
            ClientError: If a value is not finite or too large, or the whole state grew too much.
        """
        self._finite(
            {"the state": after, "the optimizer's memory": memory},
            f"server_optimizer.name={self.optimizer} after aggregator.name={self.rule} gave NaN or infinity",
        )
        self._bounded(after, "the state")
        old, new = _norm(before), _norm(after)
        if self.max_growth is not None and old and new > self.max_growth * old:
            raise self._error(
                f"the state's norm would go from {old:.3g} to {new:.3g}, federation.max_norm_ratio allows "
                f"{self.max_growth:g} times as much"
            )

    def _finite(self, groups: Mapping[str, Tensors], fault: str) -> None:
        for group, tensors in groups.items():
            for name in sorted(tensors):
                if not math.isfinite(largest(tensors[name])):
                    raise self._error(f"{fault} in tensor {name!r} of {group}")

    def _bounded(self, tensors: Tensors, what: str) -> None:
        for name in sorted(tensors):
            if (size := largest(tensors[name])) > LARGEST_WEIGHT:
                raise self._error(f"{what} would hold {size:.3g} in tensor {name!r}, {LARGEST_WEIGHT:g} is the most")

    def _error(self, fault: str) -> ClientError:
        longest = max(self.norms, key=self.norms.__getitem__, default=None)
        said = "" if longest is None else f" (longest update: client {longest!r}, norm {self.norms[longest]:.3g})"
        return ClientError(
            f"round {self.round} is not saved: {fault}{said}; leave that client out, lower federation.max_norm_ratio, "
            "client.lr or the server's learning rate, or use a robust aggregator, then resume=auto goes on after round "
            f"{self.round - 1}"
        )


def check_saved(progress: Progress) -> None:
    """Check what the loop does not check where it arises: what the server remembers, by round part and rule.

    Raises:
        ClientError: If a value is not finite.
    """
    for group, tensors in progress.memory.items():
        for name in sorted(tensors):
            if not math.isfinite(largest(tensors[name])):
                raise ClientError(
                    f"round {progress.round} is not saved: what is remembered for {group} would hold NaN or infinity "
                    f"in tensor {name!r}; lower the learning rates, then resume=auto goes on after round "
                    f"{progress.round - 1}"
                )


def largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute value, NaN where there is one, and 0 of an empty tensor."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) if math.isfinite(float(low)) else float("nan")


def _norm(tensors: Tensors) -> float:
    squares: Sequence[float] = [
        float(torch.linalg.vector_norm(tensors[name], dtype=torch.float64)) ** 2 for name in sorted(tensors)
    ]
    return math.sqrt(math.fsum(squares))

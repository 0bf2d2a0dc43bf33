"""Random blocks: the control for every rule that chooses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedproxy.seeding import generator
from fedproxy.strategies.compression.removal import BlockRemoval


@dataclass(frozen=True)
class RandomRemoval(BlockRemoval, name="random"):
    """Keeps blocks drawn without replacement, every set of them equally likely, in their order."""

    seed: int = 0
    """Seed of the draw, whatever the run's; ``${seed}`` follows the run's."""

    def choose(self, depth: int, count: int, scores: Tensor | None) -> Sequence[int]:
        """Return the drawn blocks, ascending."""
        drawn = torch.randperm(depth, generator=generator(self.seed, "compression", "random"))[:count]
        return tuple(sorted(drawn.tolist()))

"""Task arithmetic as fusion (Ilharco et al. 2023, arXiv 2212.04089): the clients' change, scaled."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder, LayerMap
from fedproxy.strategies.fusion.base import Fusion, Judge, Weights, changed_by, has_moved, state_of


@dataclass(frozen=True)
class TaskVector(Fusion, name="task_vector"):
    """W_target[pi(j)] += scale_j (W_tuned[j] - W_before[j]) for every proxy block j.

    The scales are given, or picked from ``candidates`` by the fused model's negative log-likelihood on public text
    (``compression.calibration.path``). Picking compares finished models on text that no client owns: no gradient is
    taken and no weight is fitted, so this is no training. It says how much change general text bears, not how
    well the clients' tasks are solved.
    """

    scale: Any = 1.0
    """One factor for all blocks, or a list with one for each proxy block."""
    candidates: tuple[float, ...] = ()
    """Factors to pick from; empty takes ``scale`` as it is."""
    per_block: bool = False
    """Pick for each block by itself, from the last to the first, after one has been picked for all."""
    rows: int = 32
    """Public texts that the candidates are judged on."""

    def __post_init__(self) -> None:
        """Check the options; lists become tuples."""
        scales = list(self.scale) if isinstance(self.scale, list | tuple) else [self.scale]
        self.require("scale", bool(scales) and all(map(_is_factor, scales)), "a number of at least 0 or a list of such")
        if isinstance(self.scale, list):
            object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "candidates", tuple(self.candidates))
        self.require("candidates", all(map(_is_factor, self.candidates)), "numbers of at least 0")
        self.require("per_block", not self.per_block or bool(self.candidates), "false where candidates is empty")
        self.require("rows", self.rows >= 1, "at least 1")

    @property
    def judged_texts(self) -> int:
        """``rows`` where candidates are compared."""
        return self.rows if self.candidates else 0

    def combine(self, target: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the target's weight plus the change, which :meth:`join` has scaled."""
        return changed_by(target, after - before)

    def join(
        self,
        target: PreTrainedModel,
        before: PreTrainedModel | Weights,
        after: PreTrainedModel | Weights,
        layer_map: LayerMap,
    ) -> PreTrainedModel:
        """Return the target plus the scaled change.

        Raises:
            ConfigError: If there are not as many scales as proxy blocks.
        """
        untuned, tuned = state_of(before), state_of(after)
        scales = self._scales(len(layer_map.proxy_to_target))
        return super().join(target, untuned, _Scaled(Decoder.of(target), untuned, tuned, scales), layer_map)

    def settle(
        self, target: PreTrainedModel, before: PreTrainedModel, after: Weights, layer_map: LayerMap, judge: Judge
    ) -> Self:
        """Return this operator with the candidates that give the lowest loss; of equal ones, the first listed."""
        if not self.candidates:
            return self

        def loss(scale: Any) -> float:
            return judge(replace(self, scale=scale).join(target, before, after, layer_map))

        best = min(self.candidates, key=loss)
        chosen = replace(self, scale=best, candidates=(), per_block=False)
        if not self.per_block:
            return chosen
        scales = [best] * len(layer_map.proxy_to_target)
        for index in reversed(range(len(scales))):
            trials = [(*scales[:index], candidate, *scales[index + 1 :]) for candidate in self.candidates]
            scales[index] = min(trials, key=loss)[index]
        return replace(chosen, scale=tuple(scales))

    def _scales(self, blocks: int) -> tuple[float, ...]:
        if not isinstance(self.scale, tuple):
            return (float(self.scale),) * blocks
        if len(self.scale) != blocks:
            raise ConfigError(
                f"fusion.scale must be one number or {blocks}, one per proxy block, got {len(self.scale)}"
            )
        return tuple(map(float, self.scale))


@dataclass(frozen=True)
class _Scaled(Weights):
    """The proxy's weights after tuning; of its blocks each change is scaled, float32, when it is read."""

    decoder: Decoder
    before: Weights
    after: Weights
    scales: tuple[float, ...]

    def __getitem__(self, name: str) -> Tensor:
        weight, index = self.after[name], self.decoder.block_index(name)
        if index is None or self.scales[index] == 1.0 or name not in self.before:
            return weight
        start = self.before[name]
        if not has_moved(start, weight):
            return weight
        return changed_by(start.float(), self.scales[index] * (weight.float() - start.float()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.after)

    def __len__(self) -> int:
        return len(self.after)


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 <= value < float("inf")

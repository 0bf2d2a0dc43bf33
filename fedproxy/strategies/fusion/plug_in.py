"""Training-free plug-in (FedProxy Eq 15)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedproxy.strategies.fusion.base import Fusion, changed_by


@dataclass(frozen=True)
class PlugIn(Fusion, name="plug_in"):
    """W_target[pi(j)] <- W_proxy[j] for every kept block j; all other weights keep the target's values (Eq 15).

    Choice: with a distilled proxy the two modes differ. ``replace`` copies the tuned blocks, what distillation changed
    included; ``delta`` adds only what federated tuning changed. ``scale`` other than 1 goes part of the way, or beyond.
    """

    mode: Literal["replace", "delta"] = "replace"
    """Copy the tuned blocks, or add their change since the broadcast proxy."""
    scale: float = 1.0
    """Factor on the way from the target's weight to the new one; 1 is the paper's."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("scale", 0.0 <= self.scale < float("inf"), "at least 0")

    def combine(self, target: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the tuned weight, or the target's plus the change."""
        if self.mode == "delta":
            return changed_by(target, self.scale * (after - before))
        return after if self.scale == 1.0 else changed_by(target, self.scale * (after - target))

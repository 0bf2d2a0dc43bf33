"""Training-free plug-in (FedProxy Eq 15)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedproxy.strategies.fusion.base import Fusion


@dataclass(frozen=True)
class PlugIn(Fusion, name="plug_in"):
    """W_target[pi(j)] <- W_proxy[j] for every kept block j; all other weights keep the target's values (Eq 15).

    Choice: with a distilled proxy the two modes differ. ``replace`` copies the tuned blocks, what distillation changed
    included; ``delta`` adds only what federated tuning changed.
    """

    mode: Literal["replace", "delta"] = "replace"
    """Copy the tuned blocks, or add their change since the broadcast proxy."""

    def combine(self, target: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the tuned weight, or the target's plus the change."""
        return after if self.mode == "replace" else target + (after - before)

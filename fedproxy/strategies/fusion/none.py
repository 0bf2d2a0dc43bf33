"""Nothing is plugged in: zero-shot, and the ablation without fusion."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ModelError
from fedproxy.models import LayerMap
from fedproxy.models.decoder import set_weights, share_weights
from fedproxy.strategies.fusion.base import Fusion, Weights, has_moved, state_of


@dataclass(frozen=True)
class NoFusion(Fusion, name="none"):
    """Leaves target and proxy apart: the result is the untouched target, or the tuned proxy by itself.

    ``target`` belongs to the zero-shot baseline, ``proxy`` to the ablation without plug-in, where the clients' model is
    what one ends with.
    """

    result: Literal["target", "proxy"] = "target"
    """Which of the two the run ends with."""

    @property
    def keeps_proxy(self) -> bool:
        """With ``result=proxy``."""
        return self.result == "proxy"

    def combine(self, target: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the target's weight."""
        return target

    def join(
        self,
        target: PreTrainedModel,
        before: PreTrainedModel | Weights,
        after: PreTrainedModel | Weights,
        layer_map: LayerMap,
    ) -> PreTrainedModel:
        """Return the target, or the proxy with its tuned weights cast once; both share what did not change."""
        return share_weights(target) if self.result == "target" else tuned_model(before, after, self.name)


def tuned_model(before: PreTrainedModel | Weights, after: PreTrainedModel | Weights, fusion: str) -> PreTrainedModel:
    """Return the tuned proxy as a plain model of no place on disk; it shares unchanged weights with ``before``.

    Raises:
        ModelError: If both are bare weights, from which no model can be made.
    """
    if isinstance(after, PreTrainedModel):
        return after
    if not isinstance(before, PreTrainedModel):
        raise ModelError(f"fusion.name={fusion} needs the proxy itself, not its weights alone; give the model")
    tuned = share_weights(before)
    own = state_of(before)
    changed = ((name, weight) for name, weight in after.items() if has_moved(own[name], weight))
    set_weights(tuned, {name: weight.to(own[name].dtype) for name, weight in changed})
    tuned.name_or_path = ""
    return tuned

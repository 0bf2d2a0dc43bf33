"""Proxy-Tuning (Liu et al. 2024, arXiv 2401.08565): the proxies steer the target when it decodes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ModelError
from fedproxy.models import LayerMap
from fedproxy.models.decoder import share_weights
from fedproxy.models.logit_offset import LogitOffsetModel
from fedproxy.strategies.fusion.base import Fusion, Weights
from fedproxy.strategies.fusion.none import tuned_model


@dataclass(frozen=True)
class LogitOffset(Fusion, name="logit_offset"):
    """logits = target + alpha (tuned proxy - untuned proxy); no weight of the target changes.

    Deviation: the paper's proxies are separately trained small models of the family; here the untuned proxy is the
    compressed target. The fused folder holds a configuration that names the three models; see
    :class:`fedproxy.models.logit_offset.LogitOffsetModel` for vocabularies of different length.
    """

    adds_logits: ClassVar[bool] = True

    alpha: float = 1.0
    """Strength of the offset; 1 is the paper's, 0 the target alone."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("alpha", 0.0 <= self.alpha < 3.4e38, "at least 0, and a number of float32")

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
        """Return the three models as one.

        Raises:
            ModelError: If ``before`` is a state dict alone.
        """
        if not isinstance(before, PreTrainedModel):
            raise ModelError("fusion.name=logit_offset needs the untuned proxy itself, not its weights; give the model")
        tuned = tuned_model(before, after, self.name)
        return LogitOffsetModel(share_weights(target), tuned, share_weights(before), alpha=self.alpha)

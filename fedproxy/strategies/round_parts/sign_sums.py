"""What TIES needs of clients whose updates only their sum is known of: trimmed values, magnitudes and signs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedproxy.privacy.secure_sum import unit_of
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.trimming import plan_trimming
from fedproxy.strategies.functional.voting import Sums
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart
from fedproxy.strategies.trainable.base import TrainableModel

MOST_CLIENTS = 4095
"""Clients of a sum whose positive and negative signs one float32 number counts exactly."""
_NEGATIVE = 1.0 / (MOST_CLIENTS + 1)
_MAGNITUDE, _SIGNS = "magnitude/", "signs/"


@dataclass(frozen=True)
class SignSums(RoundPart, name="sign_sums"):
    """Trims the update at the client, and sends beside it what is to be added up: magnitudes, and a count of signs.

    From the sums s of values and m of magnitudes over clients, the positive values add up to (m + s) / 2 and the
    negative ones to (s - m) / 2. With how many there are of each, that is all that TIES' election and mean take
    (:func:`fedproxy.strategies.functional.voting.ties_of_sums`), so that one linear pass does for both. A positive
    value counts 1 and a negative one 1/4096, in a unit of which fixed-point numbers hold both exactly.
    """

    order: ClassVar[int] = 93
    host_copies: ClassVar[int] = 2

    density: float = 1.0
    """Share of coordinates that trimming keeps."""
    trim_scope: str = "global"
    """``global`` trims the flattened update, ``tensor`` each tensor."""
    largest: float = 1.0
    """Largest magnitude of a number in the sum."""

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Trim the update and add magnitudes and signs."""
        trimmers = plan_trimming(Cohort([update]), [self.density], scope=self.trim_scope)
        unit = unit_of(self.largest)
        delta, beside = dict[str, Tensor](), dict[str, Tensor]()
        for name in sorted(update.delta):
            flat = update.delta[name].float().reshape(1, -1)
            kept = trimmers[name].trim([flat[0]], torch.empty_like(flat)).view(update.delta[name].shape)
            delta[name], beside[f"{_MAGNITUDE}{name}"] = kept, kept.abs()
            beside[f"{_SIGNS}{name}"] = ((kept > 0) * unit + (kept < 0) * (unit * _NEGATIVE)).float()
        return replace(update, delta=delta, extras={**update.extras, self.name: beside})

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Add magnitudes and signs."""
        forms = up["delta"].tensors
        beside = {f"{kind}{name}": forms[name] for kind in (_MAGNITUDE, _SIGNS) for name in forms}
        return {**up, self.name: Group(beside)}

    def sums(self, total: ClientUpdate) -> dict[str, Sums]:
        """Return what a round's clients sent together, by tensor.

        Args:
            total: The mean of their trimmed updates, the sums of what was beside them, and as its number of examples
                how many clients they are.
        """
        beside, unit, found = total.extras[self.name], unit_of(self.largest), {}
        for name in total.delta:
            signs = beside[f"{_SIGNS}{name}"] / unit
            positive = signs.floor()
            negative = (signs - positive) / _NEGATIVE
            found[name] = Sums(
                total.delta[name] * total.num_examples, beside[f"{_MAGNITUDE}{name}"], positive, negative
            )
        return found

"""What the server knows of an update before it comes: rows that it dealt out, tensors that it asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedproxy.protocol import Tensors
from fedproxy.strategies.round_parts import Group, RoundPart
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Expected:
    """What every update of a run must agree with, beside the broadcast that it answers."""

    rows: Mapping[str, int] | None = None
    """Rows that each client was dealt; None where the server does not know."""
    target_tokens: int | None = None
    """Most answer tokens of a row; None where the server does not know."""
    delta: Tensors | None = None
    """Names, shapes and dtypes of the update itself; None takes those of the broadcast state."""
    extras: Mapping[str, Group] = field(default_factory=dict)
    """Groups that every update carries; there may be no others."""
    masked: bool = False
    """Whether the update itself is masked, so that its values say nothing."""
    withheld: bool = False
    """Whether clients tell no losses and no counts, and all count alike."""
    own: "Mapping[str, Expected]" = field(default_factory=dict)
    """What is expected of single clients whose updates have another form, by name."""

    def of(self, client_id: str) -> "Expected":
        """Return what is expected of one client."""
        return self.own.get(client_id, self)

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[RoundPart],
        model: TrainableModel,
        *,
        rows: Mapping[str, int] | None = None,
        target_tokens: int | None = None,
        withheld: bool = False,
    ) -> "Expected":
        """Return what is expected where these parts ride with a round.

        Args:
            parts: In the order of the chain.
            model: The proxy with what is trained attached; its values play no part.
            rows: Rows that each client was dealt.
            target_tokens: Most answer tokens of a row.
            withheld: Whether clients tell no losses and no counts.
        """

        def expected(client_id: str) -> Expected:
            groups = expected_groups(parts, model, client_id)
            delta = groups.pop("delta")
            return cls(rows, target_tokens, delta.tensors, groups, delta.masked, withheld)

        own = {client: expected(client) for part in parts for client in part.differs}
        return replace(expected(""), own=own)


def expected_groups(parts: Sequence[RoundPart], model: TrainableModel, client_id: str = "") -> dict[str, Group]:
    """Return the groups of tensors that clients send: the update itself is ``delta``, the others are its extras.

    Args:
        parts: What rides with a round, in the order of the chain.
        model: The proxy with what is trained attached; its values play no part.
        client_id: Whose update it is.
    """
    state = {name: torch.empty_like(p, device="meta") for name, p in model.parameters().items()}
    groups: Mapping[str, Group] = {"delta": Group(state)}
    for part in parts:
        groups = part.expects(groups, model, client_id)
    return dict(groups)

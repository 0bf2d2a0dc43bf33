"""Secure aggregation: updates under pairwise masks, of which the server learns the sum and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.privacy.keys import Occasion, verify
from fedproxy.privacy.one_time import OneTime
from fedproxy.privacy.registration import identity_of, registered
from fedproxy.privacy.secure_sum import added, decode, encode, masked, unit_of
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.sealed_tensors import tensors_sha256
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart
from fedproxy.strategies.trainable.base import TrainableModel

ATTEMPT = "attempt"
"""Name of the number of the attempt among the key shares, which are named ``share/CLIENT``."""
_SHARE = "share/"
_CLEAR = ("privacy",)
"""Groups that say nothing of the data, and stay readable."""


@dataclass(frozen=True)
class SecureSum(RoundPart, name="secure_sum"):
    """Sends ``weight * update`` and the weight, in fixed point and masked; further groups are summed as they are.

    It is the last of the chain: what is masked is what would have crossed the wire. The server's mean is the sum of the
    weighted updates over that of the weights. Losses, row and token counts are withheld.
    """

    order: ClassVar[int] = 95
    host_copies: ClassVar[int] = 2

    run: str = ""
    """Tells this run's sums from another's."""
    largest: float = 1.0
    """Largest magnitude of a number of an update."""
    most: int = 1
    """Examples of the client that weighs most; 1 weighs all alike."""

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Weigh, round and mask the update.

        Raises:
            ClientError: If a key share is not its client's, this client is left out, a number is too large, or other
                values were masked with this client's share.
        """
        if not task.writes:
            return update
        shares, occasion = self._shares(task)
        weight = 1.0 if self.most == 1 else update.num_examples / self.most
        if not 0 < weight <= 1:
            raise ClientError(
                f"client {task.client_id!r} has {update.num_examples} examples, and the server says that none has more "
                f"than {self.most}; correct that"
            )
        groups: dict[str, Tensors] = {"delta": {name: update.delta[name] * weight for name in update.delta}}
        groups |= {name: update.extras[name] for name in update.extras if name not in _CLEAR}
        groups[self.name] = {"weight": torch.tensor(weight * unit_of(self.largest))}
        flat = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        values = encode(flat, self.largest, len(shares))
        hidden = masked(values, task.client_id, _keys(task, shares, occasion, tensors_sha256(values)))
        sent = {group: {name: hidden[f"{group}/{name}"] for name in tensors} for group, tensors in groups.items()}
        clear = {name: update.extras[name] for name in _CLEAR if name in update.extras}
        return replace(
            update,
            delta=sent.pop("delta"),
            extras={**sent, **clear},
            num_examples=1,
            num_tokens=0,
            train_loss=None,
            regularizer_loss=None,
        )

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Turn all groups into fixed point, and add the weight."""
        up = {**up, self.name: Group({"weight": torch.empty((), device="meta")})}
        return {
            name: group if name in _CLEAR else Group(_integers(group.tensors), masked=True)
            for name, group in up.items()
        }

    def summed(self, updates: Sequence[ClientUpdate]) -> ClientUpdate:
        """Return as one update what the masked updates of all clients of a round are together.

        Its ``delta`` is the weighted mean, its extras are sums.
        """
        names = [name for name in updates[0].extras if name not in _CLEAR]
        total = {name: self._sum([update.extras[name] for update in updates]) for name in names}
        delta = self._sum([update.delta for update in updates])
        weight = float(total.pop(self.name)["weight"]) / unit_of(self.largest)
        mean = {name: tensor / weight for name, tensor in delta.items()}
        return ClientUpdate("the sum", mean, extras=total, round=updates[0].round)

    def _sum(self, updates: Sequence[Tensors]) -> dict[str, Tensor]:
        whole = [{name: update[name] for name in update} for update in updates]
        return decode(added(whole), self.largest, len(updates))

    def _shares(self, task: ClientRound) -> tuple[dict[str, bytes], Occasion]:
        """Return the verified key shares of all clients of the sum, and which sum it is."""
        group = task.broadcast.extras.get(self.name, {})
        shares = {name.removeprefix(_SHARE): _bytes(group[name]) for name in group if name.startswith(_SHARE)}
        if task.signing is None or task.client_id not in shares:
            raise ClientError(f"client {task.client_id!r} is asked for a part of a sum that it has no key share in")
        occasion = Occasion(self.run, task.broadcast.round, int(group[ATTEMPT]))
        verify(shares, registered(task.signing), occasion)
        return shares, occasion


def _keys(task: ClientRound, shares: Mapping[str, bytes], occasion: Occasion, values: str) -> dict[str, bytes]:
    """Return the keys that a client has with every other one of the round, for values of this hash alone."""
    assert task.signing is not None, "its shares were verified"
    own = OneTime(task.signing, task.client_id).secret_for(occasion, shares[task.client_id], values)
    identity = identity_of(task.signing, task.client_id)
    others = {name: share for name, share in shares.items() if name != task.client_id}
    return {name: identity.secret_with(name, share, occasion, own) for name, share in others.items()}


def with_shares(broadcast: Broadcast, shares: Mapping[str, bytes], attempt: int) -> Broadcast:
    """Return a broadcast with the key shares of all clients of a sum."""
    group: dict[str, Tensor] = {f"{_SHARE}{name}": share_tensor(share) for name, share in shares.items()}
    group[ATTEMPT] = torch.tensor(attempt)
    return replace(broadcast, extras={**broadcast.extras, SecureSum.name: group})


def share_tensor(share: bytes) -> Tensor:
    """Return a key share as a tensor, uint8."""
    return torch.from_numpy(np.frombuffer(share, dtype=np.uint8).copy())


def _bytes(share: Tensor) -> bytes:
    if share.dtype != torch.uint8:
        raise ClientError("a key share must be bytes; use the server's version of FedProxy")
    raw: bytes = share.numpy().tobytes()
    return raw


def _integers(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensors[name], dtype=torch.int32) for name in tensors}

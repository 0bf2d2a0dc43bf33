"""All that crosses the wire between server and clients, as safetensors plus JSON and never pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedproxy.errors import ClientError, one_line
from fedproxy.files import parse_json
from fedproxy.seeding import ClientSeeds
from fedproxy.tensor_files import TensorFile, Tensors, nbytes

__all__ = ["FORMAT", "Broadcast", "ClientUpdate", "TensorFile", "Tensors", "nbytes"]

FORMAT = "fedproxy-1"
"""What every file on the wire says that it is."""


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every client of a round."""

    round: int
    """Round number, from 1."""
    state: Tensors
    """Trainable state phi^t that clients start from."""
    conflict: Tensors | None = None
    """Per-coordinate conflict C of the previous round (Eq 7), or None in the first."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """Plain settings of the client's task (learning rate, batch size, ...)."""
    extras: Mapping[str, Tensors] = field(default_factory=dict)
    """What a rule sends beyond the state, by group."""
    states: Mapping[str, Tensors] | None = None
    """Where clients share no state, each client's own one in place of ``state``; read when that client is served."""
    all_seeds: Mapping[str, ClientSeeds] = field(default_factory=dict)
    """The seeds of every client's own draws; each client is sent its own ones alone."""
    seeds: ClientSeeds | None = None
    """Seeds of the draws of the client that this is addressed to. They travel beside the file, which all may read."""

    def addressed_to(self, client_id: str) -> "Broadcast":
        """Return what one client is sent: its own seeds and, where clients share none, its own state."""
        state = self.state if self.states is None else self.states[client_id]
        return replace(self, state=state, states=None, all_seeds={}, seeds=self.seeds_of(client_id))

    def seeds_of(self, client_id: str) -> ClientSeeds | None:
        """Return the seeds of one client's draws."""
        return self.all_seeds.get(client_id, self.seeds)

    def same_file(self, other: "Broadcast") -> bool:
        """Return whether :meth:`save` writes for both the same objects: seeds alone may differ."""
        parts = ("state", "conflict", "job", "extras", "states")
        return self.round == other.round and all(getattr(self, part) is getattr(other, part) for part in parts)

    def save(self, path: str | Path) -> None:
        """Write the broadcast without seeds, addressed to its client where each has its own state, as safetensors."""
        assert self.states is None, "only addressed_to() a client does it have a state"
        groups = {"state": self.state, **({} if self.conflict is None else {"conflict": self.conflict})}
        meta = {"round": self.round, "job": dict(self.job), "has_conflict": self.conflict is not None}
        _save(path, "broadcast", meta, groups, self.extras)

    @classmethod
    def load(cls, path: str | Path) -> "Broadcast":
        """Read a broadcast; its tensors stay in the file until they are used.

        Raises:
            ClientError: If the file is not a broadcast.
        """
        file, meta, extras = _load(path, "broadcast")
        conflict = file.under("conflict/") if meta.get("has_conflict") else None
        number, job = meta.get("round"), meta.get("job")
        if type(number) is not int or not isinstance(job, dict):
            raise ClientError(f"{path} lacks round or job of a broadcast; ask its sender to send it again")
        return cls(number, file.under("state/"), conflict, job, extras)

    @property
    def bytes(self) -> int:
        """Payload size in bytes: state, conflict and extras."""
        return nbytes(self.state) + nbytes(self.conflict or {}) + sum(nbytes(group) for group in self.extras.values())


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back: its change of the broadcast state, and no data."""

    client_id: str
    delta: Tensors
    """The client's state minus the broadcast state; may be file-backed (:class:`TensorFile`)."""
    num_examples: int = 1
    """The client's training examples, each counted once: its weight in linear rules."""
    num_tokens: int = 0
    """Answer tokens trained on."""
    train_loss: float | None = None
    """Mean task loss over the client's local steps (nats per answer token)."""
    seconds: float = 0.0
    """Wall time of local training."""
    extras: Mapping[str, Tensors] = field(default_factory=dict)
    """Further statistics that a rule asks for (control variates, Fisher, Gram), by group."""
    regularizer_loss: float | None = None
    """Mean of the regularizer's term over the steps of ``train_loss``."""
    round: int | None = None
    """Round of the broadcast that this update answers; the server merges no other round's."""

    def save(self, path: str | Path) -> None:
        """Write the update as one safetensors file."""
        meta = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("delta", "extras")}
        _save(path, "client_update", meta, {"delta": self.delta}, self.extras)

    @classmethod
    def load(cls, path: str | Path) -> "ClientUpdate":
        """Read an update that is trusted; :mod:`fedproxy.federation.admission` takes in those that are not.

        Its tensors stay in the file until they are used.

        Raises:
            ClientError: If the file is not a client update.
        """
        return cls.of(_open(path))

    @classmethod
    def of(cls, file: TensorFile) -> "ClientUpdate":
        """Return the update that a file's tensors and metadata are.

        Raises:
            ClientError: If the metadata are not those of a client update.
        """
        meta, extras = _read(file, "client_update")
        try:
            return cls(delta=file.under("delta/"), extras=extras, **meta)
        except TypeError as error:
            reason = one_line(error, 120)
            raise ClientError(f"{file.path} has other fields than a client update ({reason}); send it again") from error

    @property
    def bytes(self) -> int:
        """Payload size in bytes: delta and extras."""
        return nbytes(self.delta) + sum(nbytes(group) for group in self.extras.values())


def _save(
    path: str | Path, kind: str, meta: Mapping[str, Any], groups: Mapping[str, Tensors], extras: Mapping[str, Tensors]
) -> None:
    named = {**groups, **{f"extras/{group}": tensors for group, tensors in extras.items()}}
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for group, tensors in named.items():
        for name, tensor in tensors.items():
            shared = tensor.data_ptr() in seen  # the format refuses tensors that share memory
            seen.add(tensor.data_ptr())
            flat[f"{group}/{name}"] = tensor.clone() if shared else tensor.contiguous()
    header = {**meta, "extras": sorted(extras)}
    save_file(flat, str(path), metadata={"format": FORMAT, "kind": kind, "meta": json.dumps(header)})


def _load(path: str | Path, kind: str) -> tuple[TensorFile, dict[str, Any], dict[str, Tensors]]:
    file = _open(path)
    return file, *_read(file, kind)


def _open(path: str | Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ClientError(
            f"{path} is not a readable safetensors file ({reason}); ask its sender to send it again"
        ) from error


def _read(file: TensorFile, kind: str) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Return the fields and the groups of extras of a file of ours."""
    header = file.metadata
    if header.get("format") != FORMAT or header.get("kind") != kind:
        raise ClientError(
            f"{file.path} is not a FedProxy {kind.replace('_', ' ')}; ask its sender for one of format {FORMAT}"
        )
    try:
        meta = parse_json(header["meta"], dict)
        groups = [str(group) for group in meta.pop("extras")]
    except (KeyError, ValueError, TypeError) as error:
        raise ClientError(f"{file.path} has a header that cannot be read; ask its sender to send it again") from error
    return meta, {group: file.under(f"extras/{group}/") for group in groups}

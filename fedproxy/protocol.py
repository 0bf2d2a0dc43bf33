"""What crosses the wire between server and clients in a round, as safetensors plus JSON and never pickle.

What else the server asks is in :mod:`fedproxy.messages`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fedproxy.errors import ClientError, one_line
from fedproxy.files import parse_json
from fedproxy.seeding import ClientSeeds
from fedproxy.tensor_files import TensorFile, Tensors, nbytes, write_tensors

__all__ = [
    "FORMAT",
    "Broadcast",
    "ClientUpdate",
    "Kept",
    "Mapped",
    "TensorFile",
    "Tensors",
    "is_seal",
    "nbytes",
]

FORMAT = "fedproxy-1"
"""What every file on the wire says that it is."""
_SEAL = re.compile(r"(?:[0-9a-f]{64})?")


@dataclass(frozen=True)
class Kept:
    """What a client keeps for itself after a round, as the server knows it: not what it is, but which one."""

    round: int = 0
    """The last round that counted and after which the client kept something; 0 where there is none."""
    seal: str = ""
    """SHA-256 of it, as the client said."""

    @classmethod
    def of(cls, said: Any) -> "Kept":
        """Return what plain values say.

        Raises:
            ClientError: If they say something else.
        """
        match said:
            case {"round": int(number), "seal": str(seal)} if len(said) == 2 and number >= 0 and is_seal(seal):
                return cls(number, seal)
        raise ClientError("the message does not say what the client is to go on from; send round and seal")


def is_seal(value: object) -> bool:
    """Return whether a value is a SHA-256 in hexadecimal digits, or empty."""
    return isinstance(value, str) and _SEAL.fullmatch(value) is not None


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every client of a round."""

    round: int
    """Round number, from 1."""
    state: Tensors
    """Trainable state phi^t that clients start from."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """Plain settings of the client's task (learning rate, batch size, ...)."""
    extras: Mapping[str, Tensors] = field(default_factory=dict)
    """What rides with the round beyond the state, by round part."""
    each: "Mapping[str, Broadcast] | None" = None
    """Where clients are not all sent the same: each one's own broadcast, made when that client is served."""
    all_seeds: Mapping[str, ClientSeeds] = field(default_factory=dict)
    """The seeds of every client's own draws; each client is sent its own ones alone."""
    all_kept: Mapping[str, Kept] = field(default_factory=dict)
    """What every client goes on from, where that is something; each client is told its own alone."""
    seeds: ClientSeeds | None = None
    """Seeds of the draws of the client that this is addressed to. They travel beside the file, which all may read."""
    kept: Kept = Kept()
    """What the client that this is addressed to goes on from; it forgets what it kept later. Beside the file, too."""

    def addressed_to(self, client_id: str) -> "Broadcast":
        """Return what one client is sent: its own seeds and memory and, where clients differ, its own rest."""
        own = self if self.each is None else self.each[client_id]
        seeds, kept = self.seeds_of(client_id), self.all_kept.get(client_id, self.kept)
        return replace(own, each=None, all_seeds={}, all_kept={}, seeds=seeds, kept=kept)

    def beside(self) -> dict[str, Any]:
        """Return as plain values what travels beside the file of a broadcast that is addressed to its client."""
        seeds = {} if self.seeds is None else {"seeds": asdict(self.seeds)}
        return {**seeds, "kept": asdict(self.kept)}

    def with_own(self, beside: Mapping[str, Any]) -> "Broadcast":
        """Return the broadcast that was read from its file, with what :meth:`beside` said."""
        seeds = ClientSeeds(**beside["seeds"]) if "seeds" in beside else None
        return replace(self, seeds=seeds, kept=Kept.of(beside["kept"]))

    def mapped(self, change: "Callable[[Broadcast], Broadcast]") -> "Broadcast":
        """Return the broadcast changed, and every client's own one likewise."""
        changed = change(replace(self, each=None))
        return changed if self.each is None else replace(changed, each=Mapped(self.each, lambda _, own: change(own)))

    def seeds_of(self, client_id: str) -> ClientSeeds | None:
        """Return the seeds of one client's draws."""
        return self.all_seeds.get(client_id, self.seeds)

    def save(self, path: str | Path) -> None:
        """Write the broadcast without seeds as one safetensors file; one of many is addressed to its client before.

        Raises:
            OSError: If it cannot be written.
        """
        assert self.each is None, "what is written is addressed_to() one client"
        meta = {"round": self.round, "job": dict(self.job)}
        _save(path, "broadcast", meta, {"state": self.state}, self.extras)

    @classmethod
    def load(cls, path: str | Path) -> "Broadcast":
        """Read a broadcast; its tensors stay in the file until they are used.

        Raises:
            ClientError: If the file is not a broadcast.
        """
        file, meta, extras = _load(path, "broadcast")
        number, job = meta.get("round"), meta.get("job")
        if type(number) is not int or not isinstance(job, dict):
            raise ClientError(f"{path} lacks round or job of a broadcast; ask its sender to send it again")
        return cls(number, file.under("state/"), job, extras)

    @property
    def bytes(self) -> int:
        """Payload size in bytes: state and extras."""
        return nbytes(self.state) + sum(nbytes(group) for group in self.extras.values())


class Mapped(Mapping[str, Broadcast]):
    """Broadcasts by client, each changed when it is asked for.

    Args:
        each: The broadcasts; a mapping of anything else is turned into broadcasts by ``change``.
        change: Maps a client and its value to its broadcast.
    """

    def __init__(self, each: Mapping[str, Any], change: Callable[[str, Any], Broadcast]) -> None:
        self._each, self._change = each, change

    def __getitem__(self, client_id: str) -> Broadcast:
        """Return a client's broadcast, changed now."""
        return self._change(client_id, self._each[client_id])

    def __iter__(self) -> Iterator[str]:
        """Yield the clients' names."""
        return iter(self._each)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._each)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back: its change of the broadcast state, and no data."""

    client_id: str
    delta: Tensors
    """The client's state minus the broadcast state; may be file-backed (:class:`fedproxy.tensor_files.TensorFile`)."""
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
    seal: str = ""
    """SHA-256 of what the client kept for its next round, for the server to name it by; empty if it kept nothing."""
    wire_bytes: int | None = None
    """Bytes that crossed the wire, where the tensors were decoded since."""

    def save(self, path: str | Path) -> None:
        """Write the update as one safetensors file.

        Raises:
            OSError: If it cannot be written.
        """
        meta = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("delta", "extras", "wire_bytes")
        }
        _save(path, "client_update", meta, {"delta": self.delta}, self.extras)

    @classmethod
    def load(cls, path: str | Path) -> "ClientUpdate":
        """Read an update that is trusted; :mod:`fedproxy.federation.server.admission` takes in those that are not.

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
            return cls(delta=file.under("delta/"), extras=extras, wire_bytes=None, **meta)
        except TypeError as error:
            reason = one_line(error, 120)
            raise ClientError(f"{file.path} has other fields than a client update ({reason}); send it again") from error

    @property
    def bytes(self) -> int:
        """Payload size in bytes: delta and extras, as they crossed the wire."""
        if self.wire_bytes is not None:
            return self.wire_bytes
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
    write_tensors(path, flat, {"format": FORMAT, "kind": kind, "meta": json.dumps(header)})


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
        reason = one_line(error, 80)
        raise ClientError(
            f"{file.path} has a header that cannot be read ({reason}); ask its sender to send it again"
        ) from error
    return meta, {group: file.under(f"extras/{group}/") for group in groups}

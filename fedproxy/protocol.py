"""All that crosses the wire between server and clients, as safetensors plus JSON and never pickle."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedproxy.errors import ClientError

_FORMAT = "fedproxy-1"
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that may cross the wire."""
Tensors = Mapping[str, Tensor]


class TensorFile(Mapping[str, Tensor]):
    """Tensors of one safetensors file, read one at a time when asked for.

    Args:
        path: The file.
        prefix: Only tensors whose name starts with this are seen, under the rest of their name.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        self.path, self.prefix = Path(path), prefix
        self._file = safe_open(self.path, framework="pt")
        self._names = tuple(sorted(n.removeprefix(prefix) for n in self._file.keys() if n.startswith(prefix)))  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(self.prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._file.get_slice(self.prefix + name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it.

        Raises:
            ClientError: If it is none of those that may cross the wire.
        """
        kind = self._header[self.prefix + name]["dtype"]
        if kind not in _DTYPES:
            raise ClientError(f"{self.path}: tensor {name!r} is of type {kind}; send one of {', '.join(_DTYPES)}")
        return _DTYPES[kind]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take, without reading them."""
        return sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Return coordinates [start, stop) of the flattened tensor, read without mapping the file into memory.

        Raises:
            ClientError: If the file ends too early.
        """
        tensor = torch.empty(stop - start, dtype=self.dtype(name))
        raw: memoryview = memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
        begin = self._data_start + self._header[self.prefix + name]["data_offsets"][0] + start * tensor.element_size()
        if os.preadv(self._raw.fileno(), [raw], begin) != len(raw):
            raise ClientError(f"{self.path} ends within tensor {name!r}; ask its sender to send it again")
        return tensor

    @cached_property
    def _raw(self) -> BinaryIO:
        return self.path.open("rb")

    @cached_property
    def _data_start(self) -> int:
        return 8 + int.from_bytes(os.pread(self._raw.fileno(), 8, 0), "little")

    @cached_property
    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(os.pread(self._raw.fileno(), self._data_start - 8, 8))
        return header


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

    def addressed_to(self, client_id: str) -> "Broadcast":
        """Return what one client is sent: this broadcast, or that client's own."""
        return self if self.each is None else self.each[client_id]

    def mapped(self, change: "Callable[[str | None, Broadcast], Broadcast]") -> "Broadcast":
        """Return the broadcast changed, and every client's own one likewise.

        Args:
            change: Maps the client (None for what stands for all) and a broadcast to the changed one.
        """
        changed = change(None, replace(self, each=None))
        return changed if self.each is None else replace(changed, each=Mapped(self.each, change))

    def save(self, path: str | Path) -> None:
        """Write the broadcast, addressed to its client where each has its own state, as one safetensors file."""
        assert self.each is None, "what is written is addressed_to() one client"
        meta = {"round": self.round, "job": dict(self.job)}
        _save(path, "broadcast", meta, {"state": self.state}, self.extras)

    @classmethod
    def load(cls, path: str | Path) -> "Broadcast":
        """Read a broadcast; its tensors stay in the file until they are used.

        Raises:
            ClientError: If the file is not a broadcast.
        """
        meta, extras = _load(path, "broadcast")
        try:
            return cls(meta["round"], TensorFile(path, "state/"), meta["job"], extras)
        except KeyError as error:
            raise ClientError(
                f"{path} lacks the field {error} of a broadcast; ask its sender to send it again"
            ) from error

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
        return self._change(client_id, self._each[client_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._each)

    def __len__(self) -> int:
        return len(self._each)


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
        """Read an update; its tensors stay in the file until they are used.

        Raises:
            ClientError: If the file is not a client update.
        """
        meta, extras = _load(path, "client_update")
        try:
            return cls(delta=TensorFile(path, "delta/"), extras=extras, **meta)
        except TypeError as error:
            raise ClientError(f"{path} has other fields than a client update ({error}); send it again") from error

    @property
    def bytes(self) -> int:
        """Payload size in bytes: delta and extras."""
        return nbytes(self.delta) + sum(nbytes(group) for group in self.extras.values())


def nbytes(tensors: Tensors) -> int:
    """Return the bytes that the tensors of a mapping take."""
    if isinstance(tensors, TensorFile):
        return tensors.nbytes
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


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
    save_file(flat, str(path), metadata={"format": _FORMAT, "kind": kind, "meta": json.dumps(header)})


def _load(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensors]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ClientError(
            f"{path} is not a readable safetensors file ({error}); ask its sender to send it again"
        ) from error
    if header.get("format") != _FORMAT or header.get("kind") != kind:
        raise ClientError(
            f"{path} is not a FedProxy {kind.replace('_', ' ')}; ask its sender for one of format {_FORMAT}"
        )
    try:
        meta: dict[str, Any] = dict(json.loads(header["meta"]))
        groups = [str(group) for group in meta.pop("extras")]
    except (KeyError, ValueError, TypeError) as error:
        raise ClientError(f"{path} has a header that cannot be read; ask its sender to send it again") from error
    return meta, {group: TensorFile(path, f"extras/{group}/") for group in groups}

"""Clients that need torch alone: they answer with known numbers, or fail in a way that a file asks for."""

import os
import pickle
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedproxy.errors import ClientError
from fedproxy.federation.engines import RemoteClient
from fedproxy.messages import UpdateFile
from fedproxy.protocol import Broadcast, ClientUpdate

STATE = {"a": torch.zeros(3, 2), "b": torch.zeros(4)}
CLIENTS = ("ann", "bob", "cid", "dot")


def broadcast(round_: int = 1) -> Broadcast:
    return Broadcast(round_, STATE, job={"lr": 0.5})


def honest(client_id: str, round_: int = 1) -> ClientUpdate:
    """The k-th client moves every coordinate by k + 1 times the round."""
    step = float(round_ * (1 + CLIENTS.index(client_id)))
    delta = {name: torch.full_like(tensor, step) for name, tensor in STATE.items()}
    return ClientUpdate(client_id, delta, num_examples=2, train_loss=1.0, regularizer_loss=0.0, round=round_)


def loaded(answer):
    """The update that an answer is, of which those in files are read as they came."""
    return ClientUpdate.load(answer.path) if isinstance(answer, UpdateFile) else answer


@dataclass
class Double:
    """A client whose behaviour lies in ``<folder>/<client>``, a word; ``word once`` is obeyed a single time."""

    folder: str
    device: int | None = None

    def train(self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None) -> ClientUpdate:
        update = honest(client_id, broadcast.round)
        path = Path(self.folder) / client_id
        word = path.read_text() if path.is_file() else ""
        if word.endswith(" once"):
            word = word.removesuffix(" once")
            path.unlink()
        (Path(self.folder) / f"{client_id}.seen").open("a").write(f"{os.getpid()}\n")
        if word == "echo":  # the state that it was sent, read out of its file
            return replace(update, delta={name: tensor.clone() for name, tensor in broadcast.state.items()})
        return FAULTS[word](update)


def client(folder: str, device: int | None = None) -> Double:
    return Double(folder, device)


def broken_factory(device: int | None = None) -> Double:
    raise ClientError("this proxy cannot be loaded")


def dying_factory(device: int | None = None) -> Double:
    os._exit(3)


def starting_client(folder: str, device: int | None = None) -> Double:
    """A client whose start obeys the word in ``<folder>/start``."""
    path = Path(folder) / "start"
    word, _, once = path.read_text().partition(" ") if path.is_file() else ("", "", "")
    if once:
        path.unlink()
    (Path(folder) / "starts").open("a").write(f"{os.getpid()}\n")
    if word == "fail":
        raise ClientError("out of device memory")
    if word == "die":
        os._exit(3)
    time.sleep({"hang": 3600.0, "slow": 4.0}.get(word, 0.0))
    return Double(folder, device)


def remote(folder: Path, factory: str = "client") -> RemoteClient:
    return RemoteClient(f"{__name__}:{factory}", {"folder": str(folder)})


def _die(update):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(update):
    time.sleep(3600)


def _fail(update):
    raise RuntimeError("out of\nmemory")


def _slow(update):
    time.sleep(0.3)
    return update


def _changed(**change):
    return lambda update: replace(update, **change)


def _delta(change):
    return lambda update: replace(update, delta=change(dict(update.delta)))


class _Foreign(ClientUpdate):
    def save(self, path):
        Path(path).write_bytes(pickle.dumps({"delta": [1.0]}))


class _Nested(ClientUpdate):
    """A header nested so deeply that it cannot be parsed."""

    def save(self, path):
        meta = {"format": "fedproxy-1", "kind": "client_update", "meta": "[" * 10**6}
        save_file(dict(self.delta), path, metadata=meta)


class _Truncated(ClientUpdate):
    def save(self, path):
        super().save(path)
        Path(path).write_bytes(Path(path).read_bytes()[:-8])


def _as(kind):
    return lambda update: kind(**{name: getattr(update, name) for name in ClientUpdate.__dataclass_fields__})


FAULTS = {
    "": lambda update: update,
    "die": _die,
    "hang": _hang,
    "raise": _fail,
    "slow": _slow,
    "nan": _delta(lambda delta: {**delta, "b": torch.tensor([0.0, float("nan"), 0.0, 0.0])}),
    "inf": _delta(lambda delta: {**delta, "b": torch.tensor([0.0, float("inf"), 0.0, 0.0])}),
    "key": _delta(lambda delta: {"a": delta["a"], "c": delta["b"]}),
    "shape": _delta(lambda delta: {**delta, "b": delta["b"][:3]}),
    "dtype": _delta(lambda delta: {**delta, "b": delta["b"].double()}),
    "huge": _delta(lambda delta: {name: 2e3 * tensor for name, tensor in delta.items()}),
    "3e38": _delta(lambda delta: {name: torch.full_like(tensor, 3e38) for name, tensor in delta.items()}),
    "replay": lambda update: replace(update, round=update.round - 1),
    "round 2.0": _changed(round=2.0),
    "counts": _changed(num_examples=-5),
    "weighs 1e12": _changed(num_examples=10**12),
    "weighs 1e400": _changed(num_examples=10**400),
    "trained 1e12": _changed(num_tokens=10**12),
    "loss 1e400": _changed(train_loss=10**400),
    "loss nan": _changed(train_loss=float("nan")),
    "loss true": _changed(train_loss=True),
    "term inf": _changed(regularizer_loss=float("inf")),
    "seconds 1e400": _changed(seconds=10**400),
    "seconds none": _changed(seconds=None),
    "seconds -1": _changed(seconds=-1.0),
    "unasked": _changed(extras={"fisher": {"a": torch.ones(3, 2)}}),
    "name": _changed(client_id="dot"),
    "pickle": _as(_Foreign),
    "nested": _as(_Nested),
    "truncated": _as(_Truncated),
}

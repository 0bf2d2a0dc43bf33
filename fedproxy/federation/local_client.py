"""How a client that trains for real is made, in this process or in another one, from plain values alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedproxy.federation.client import LocalClient
from fedproxy.federation.client_rows import ClientExamples
from fedproxy.federation.client_store import ClientStore
from fedproxy.federation.engines import RemoteClient
from fedproxy.models import load_model, load_tokenizer
from fedproxy.strategies.trainable import Trainable
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class LocalSetup:
    """What a client needs: the proxy, its rows and how it trains. Nothing here names the target."""

    proxy: str
    """Folder of the proxy."""
    dtype: str
    """Precision of the proxy's frozen weights."""
    trainable: Mapping[str, Any]
    """Name and options of what is trained."""
    rows: str
    """Folder of all clients' rows; a client's file is opened when that client trains."""
    store: str
    """Folder of what clients keep between rounds."""
    max_input_tokens: int
    max_target_tokens: int
    trainer: Mapping[str, Any]
    """Options of lightning.Trainer."""

    def client(self, model: TrainableModel, tokenizer: PreTrainedTokenizerBase) -> LocalClient:
        """Return a client that trains on a proxy which is loaded already."""
        examples = ClientExamples(
            Path(self.rows),
            tokenizer,
            max_input_tokens=self.max_input_tokens,
            max_target_tokens=self.max_target_tokens,
        )
        pad = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
        store = ClientStore(Path(self.store))
        return LocalClient(model, examples, pad_id=pad, trainer=self.trainer, store=store)

    def remote(self, plugins: Sequence[str]) -> RemoteClient:
        """Return how another process makes this client, on each device that the trainer may use."""
        return RemoteClient(f"{__name__}:load", asdict(self), plugins, _accelerators(self.trainer))


def load(*, device: int | None, **options: Any) -> LocalClient:
    """Load the proxy and return the client that trains on it.

    Args:
        device: Index of the accelerator to train on; None leaves the trainer's choice.
        options: Fields of :class:`LocalSetup`.
    """
    setup = LocalSetup(**options)
    if device is not None:
        setup = replace(setup, trainer={**setup.trainer, "devices": [device]})
    node = dict(setup.trainable)
    trainable = Trainable.by_name(node.pop("name"))(**node)
    model = trainable.attach(load_model(setup.proxy, dtype=setup.dtype))  # the broadcast brings the initial state
    return setup.client(model, load_tokenizer(setup.proxy))


def _accelerators(trainer: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the accelerators of this node that the trainer may use; none where it stays on the CPU."""
    if trainer.get("accelerator") == "cpu" or not torch.accelerator.is_available():
        return ()
    devices = trainer.get("devices", "auto")
    return tuple(devices) if isinstance(devices, list) else tuple(range(torch.accelerator.device_count()))

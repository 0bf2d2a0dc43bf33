"""How a client that trains for real is made, in this process or in another one, from plain values alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedproxy.federation.client.base import RemoteClient
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.federation.client.rows import ClientExamples
from fedproxy.federation.client.site import Site
from fedproxy.models import load_model, load_tokenizer
from fedproxy.models.positions import positions
from fedproxy.models.quantized import load_quantized
from fedproxy.modules.devices import ClientDevices, accelerators, one_device, training_device
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
    long_rows: str = "cut"
    """What becomes of rows that are too long, see :class:`fedproxy.data.examples.Lengths`."""
    quantization: str = "none"
    """Bits of the frozen weights: none, 8bit or 4bit."""
    ledger: str | None = None
    """Folder of the clients' privacy ledgers, beside their data."""
    signing: str | None = None
    """Folder of the clients' signing secrets and of the keys that they have pinned."""
    logs: str | None = None
    """Folder for what Lightning's loggers, profilers and callbacks write; None is the working directory."""

    def client(self, model: TrainableModel, tokenizer: PreTrainedTokenizerBase) -> Site:
        """Return a site for this process, which trains on a proxy that is loaded already where it can."""
        trainer = one_device(self.trainer)
        if self.quantization != "none":
            model, tokenizer = self.load(training_device(trainer))
        return self.in_this_process(model, tokenizer, trainer)

    def in_this_process(
        self, model: TrainableModel, tokenizer: PreTrainedTokenizerBase, trainer: Mapping[str, Any]
    ) -> Site:
        """Return a site that trains on a given proxy with given Trainer options."""
        trained, held_out = (
            ClientExamples(
                Path(self.rows),
                tokenizer,
                max_input_tokens=self.max_input_tokens,
                max_target_tokens=self.max_target_tokens,
                max_tokens=positions(model.model.config),
                long_rows=self.long_rows,
                held_out=held_out,
            )
            for held_out in (False, True)
        )
        pad = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
        memory = ClientMemory(Path(self.store))
        logs = None if self.logs is None else Path(self.logs)
        ledger, signing = (None if folder is None else Path(folder) for folder in (self.ledger, self.signing))
        return Site(
            model,
            trained,
            pad_id=pad,
            trainer=trainer,
            memory=memory,
            logs=logs,
            held_out=held_out,
            proxy=Path(self.proxy),
            ledger=ledger,
            signing=signing,
        )

    def remote(self, plugins: Sequence[str]) -> RemoteClient:
        """Return how another process makes this client, on each device, or group of devices, that it may use."""
        there, devices = accelerators(self.trainer), ClientDevices.of(self.trainer)
        logs = str(Path(self.store) / "logs")
        if devices.count == 1:
            return RemoteClient(f"{__name__}:load", asdict(self), plugins, there, logs)
        options = {"setup": asdict(self), "devices": there, "count": devices.count, "strategy": devices.strategy}
        groups = tuple(range(len(there) // devices.count))
        return RemoteClient(
            "fedproxy.federation.client.ranks:load", options, plugins, groups, logs, ranks=devices.count
        )

    def load(self, device: torch.device) -> tuple[TrainableModel, PreTrainedTokenizerBase]:
        """Load the proxy with what is trained attached, and its tokenizer; the broadcast brings the initial state.

        Only quantised weights are put on the device at once.
        """
        node = dict(self.trainable)
        trainable = Trainable.by_name(node.pop("name"))(**node)
        if self.quantization == "none":
            proxy = load_model(self.proxy, dtype=self.dtype)
        else:
            proxy = load_quantized(self.proxy, self.quantization, dtype=getattr(torch, self.dtype), device=device)
        return trainable.attach(proxy), load_tokenizer(self.proxy)


def load(*, device: int | None, **options: Any) -> Site:
    """Load the proxy and return the site that trains on it, in one process.

    Args:
        device: Index of the accelerator to train on; None leaves the trainer's choice.
        options: Fields of :class:`LocalSetup`.
    """
    setup = LocalSetup(**options)
    trainer = one_device(setup.trainer) if device is None else {**setup.trainer, "devices": [device]}
    return setup.in_this_process(*setup.load(training_device(trainer)), trainer)

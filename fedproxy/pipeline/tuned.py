"""What federation leaves: the tuned proxy, one for all clients, or one each where clients are never merged."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.config import RunConfig
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.files import ServerFiles
from fedproxy.models.decoder import Overlay, set_weights, share_weights
from fedproxy.names import file_stem
from fedproxy.protocol import Tensors
from fedproxy.seeding import generator
from fedproxy.strategies.trainable import Trainable

MERGED = ""
"""The one state of a run whose clients are merged, where others have a client's name."""


def folder_of(folder: Path, client: str) -> Path:
    """Return a client's own folder in ``folder``, and ``folder`` itself for :data:`MERGED`."""
    return folder if client == MERGED else folder / file_stem(client)


def final_states(
    config: RunConfig, progress: Progress, files: ServerFiles, clients: Mapping[str, object]
) -> Mapping[str, Tensors]:
    """Return the trained states of a run: one under :data:`MERGED`, or every client's own, read when asked for."""
    if config.aggregator.aggregates:
        return {MERGED: progress.state}
    return files.states.after(progress, sorted(clients))


@dataclass
class TunedProxy:
    """The proxy after federation, taken apart: weights as broadcast, and those that tuning changed."""

    proxy: PreTrainedModel
    """The plain proxy as broadcast."""
    merged: Mapping[str, Tensor]
    """Changed weights, LoRA merged, float32, by their name in the plain proxy; each is computed when it is read."""
    emulator: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen blocks as last re-aligned: part of the tuned proxy that clients hold, but never plugged in."""

    def model(self) -> PreTrainedModel:
        """Return the tuned proxy as a plain model in the proxy's dtype; it shares unchanged weights."""
        tuned = share_weights(self.proxy)
        changed = Overlay(self.emulator, self.merged)
        set_weights(tuned, {name: weight.to(self.proxy.dtype) for name, weight in changed.items()})
        return tuned


class TunedProxies(Mapping[str, TunedProxy]):
    """Tuned proxies by client; each is put together when asked for, so that only one lies in memory.

    Args:
        proxy: The plain proxy as broadcast.
        trainable: What was trained in it.
        states: The trained states, by client or under :data:`MERGED`.
        seed: Seed of the run.
        known: The one under :data:`MERGED`, which is more than its state where frozen weights moved.
    """

    def __init__(
        self,
        proxy: PreTrainedModel,
        trainable: Trainable,
        states: Mapping[str, Tensors],
        *,
        seed: int,
        known: TunedProxy | None = None,
    ) -> None:
        self.proxy, self._trainable, self._states, self._seed = proxy, trainable, states, seed
        self._last = None if known is None else (MERGED, known)

    @property
    def separate(self) -> bool:
        """Whether every client has one of its own."""
        return MERGED not in self._states

    def __iter__(self) -> Iterator[str]:
        """Yield the clients' names."""
        return iter(self._states)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._states)

    def __getitem__(self, client: str) -> TunedProxy:
        """Put a client's tuned proxy together; the one that was asked for last is kept."""
        if self._last is None or self._last[0] != client:
            self._last = None  # let go of the other one first
            model = self._trainable.attach(self.proxy, generator(self._seed, "trainable"))
            model.load_state(self._states[client])
            merged = model.merged_weights()
            self._last = client, TunedProxy(model.detach(), merged)
        return self._last[1]

"""The emulator of a round: aligned by the server before the broadcast, taken over by every client."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedproxy.errors import ClientError, ConfigError
from fedproxy.federation.checkpoint import Progress
from fedproxy.models import Decoder
from fedproxy.models.sharding import assign
from fedproxy.protocol import Tensors
from fedproxy.seeding import generator
from fedproxy.strategies.realignment import Material, Realignment
from fedproxy.strategies.trainable.base import TrainableModel

GROUP = "emulator"
"""Group of :attr:`fedproxy.protocol.Broadcast.extras` that carries the emulator's weights."""


@dataclass(frozen=True)
class Aligned:
    """The emulator of one round."""

    weights: dict[str, Tensor]
    """All weights of the emulator's blocks by their name in the plain proxy; nothing else of the server's."""
    loss: float | None
    """Mean loss of the last steps."""
    seconds: float
    """Wall time on the server."""


class Realigner:
    """Aligns the proxy that the server holds; every round depends on the round before and the seed alone.

    Args:
        realignment: How.
        model: The proxy with its trained part attached, its frozen weights as clients first received them.
        material: What to align with.
        seed: Seed of the run.

    Raises:
        ConfigError: If clients train every block.
    """

    def __init__(self, realignment: Realignment, model: TrainableModel, material: Material, *, seed: int) -> None:
        self.realignment, self.model, self.material, self.seed = realignment, model, material, seed
        self.blocks = emulator_blocks(model)
        if not self.blocks:
            raise ConfigError(
                f"realignment.name={realignment.name} needs blocks that no client trains, but all are trained; "
                "set trainable.blocks (ends, last or a list), or realignment.name=none"
            )
        self._sent = {name: parameter.detach().clone() for name, parameter in emulator_weights(model).items()}

    def align(self, progress: Progress) -> Aligned:
        """Return the emulator of the round after ``progress``."""
        started = time.perf_counter()
        self.model.load_state(progress.state)
        receive(self.model, progress.emulator or self._sent)
        draws = generator(self.seed, progress.round + 1, "realignment")
        loss = self.realignment.align(self.model, self.blocks, self.material, draws)
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in emulator_weights(self.model).items()}
        return Aligned(weights, loss, time.perf_counter() - started)

    def restore(self) -> None:
        """Give the model the frozen weights back that clients first received."""
        receive(self.model, self._sent)


def emulator_blocks(model: TrainableModel) -> list[int]:
    """Return the indices of the proxy's blocks in which nothing is trained, ascending."""
    trained = {id(parameter) for parameter in model.parameters().values()}
    blocks = Decoder.of(model.model).blocks
    return [i for i, block in enumerate(blocks) if trained.isdisjoint(map(id, block.parameters()))]


def emulator_weights(model: TrainableModel) -> dict[str, nn.Parameter]:
    """Return the live weights of the emulator's blocks by their name in the plain proxy."""
    decoder = Decoder.of(model.model)
    return {
        decoder.full_name(index, name): parameter
        for index in emulator_blocks(model)
        for name, parameter in decoder.blocks[index].named_parameters()
    }


@torch.no_grad()
def receive(model: TrainableModel, weights: Tensors) -> None:
    """Copy an emulator's weights into a proxy, all of them or nothing.

    Raises:
        ClientError: If a weight is unknown here, trained here or of another shape.
    """
    own: Mapping[str, nn.Parameter] = emulator_weights(model) if weights else {}
    for name in weights:
        if name not in own or weights[name].shape != own[name].shape:
            raise ClientError(
                f"the broadcast's emulator has {name} of shape {tuple(weights[name].shape)}, which is no frozen weight "
                "of this proxy; start from the proxy and the trainable options of this run"
            )
    for name in weights:
        assign(own[name], weights[name])

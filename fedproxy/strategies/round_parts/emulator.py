"""The emulator of a round: aligned by the server before the broadcast, taken over by every client."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedproxy.errors import ClientError, ConfigError
from fedproxy.models import Decoder
from fedproxy.models.sharding import assign
from fedproxy.protocol import Broadcast, Tensors
from fedproxy.seeding import generator
from fedproxy.strategies.realignment import Material, Realignment
from fedproxy.strategies.round_parts.base import ClientRound, RoundPart, RoundResult
from fedproxy.strategies.trainable.base import TrainableModel


class Aligner:
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
        self.loss: float | None = None
        """Mean loss of the last steps of the latest alignment."""
        self.seconds = 0.0
        """Wall time of the latest alignment."""

    def align(self, round_: int, state: Tensors, before: Tensors) -> dict[str, Tensor]:
        """Return all weights of the emulator's blocks for a round, by their name in the plain proxy.

        Args:
            round_: The round that begins.
            state: The shared state.
            before: The emulator of the round before; empty in the first.
        """
        started = time.perf_counter()
        self.model.load_state(state)
        receive(self.model, before or self._sent)
        draws = generator(self.seed, round_, "realignment")
        self.loss = self.realignment.align(self.model, self.blocks, self.material, draws)
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in emulator_weights(self.model).items()}
        self.seconds = time.perf_counter() - started
        return weights

    def restore(self) -> None:
        """Give the model the frozen weights back that clients first received."""
        receive(self.model, self._sent)


class Outlined:
    """Stands in for an :class:`Aligner` where only shapes are asked for.

    Args:
        model: The proxy with what is trained attached, on the meta device.
    """

    loss, seconds = None, 0.0

    def __init__(self, model: TrainableModel) -> None:
        self.model = model

    def align(self, round_: int, state: Tensors, before: Tensors) -> dict[str, Tensor]:
        """Return the weights that would be aligned."""
        return {name: parameter.detach() for name, parameter in emulator_weights(self.model).items()}


@dataclass(frozen=True)
class Emulator(RoundPart, name="emulator"):
    """Sends the proxy's frozen blocks as the server re-aligned them before the round (FedBiOT)."""

    order: ClassVar[int] = 5

    aligner: Aligner | Outlined | None = field(default=None, metadata={"server": True})
    """What aligns them; the server's alone."""

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Align the blocks and add them."""
        assert self.aligner is not None, "the server binds it"
        weights = self.aligner.align(broadcast.round, broadcast.state, memory)
        return replace(broadcast, extras={**broadcast.extras, self.name: weights})

    def receive(self, task: ClientRound) -> None:
        """Take the blocks over."""
        receive(task.model, task.broadcast.extras.get(self.name, {}))

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Keep the blocks, and note what aligning them took."""
        if self.aligner is not None:
            result.figures["realignment_loss"] = self.aligner.loss
            result.figures["server_seconds"] = result.figures.get("server_seconds", 0.0) + self.aligner.seconds
        return result.broadcast.extras[self.name]


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

"""What a client trains inside the proxy: the family's base and what attaching to a model gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.errors import ModelError
from fedproxy.models import Decoder, LayerMap
from fedproxy.models.sharding import assign, whole
from fedproxy.registry import Component


class TrainableModel(ABC):
    """A proxy whose trainable parameters are named, read and replaced as one state.

    Clients share one resident model: :meth:`load_state` copies a state into place and allocates nothing.

    Args:
        model: The proxy itself, forward unchanged in use.
        parameters: Its trainable parameters by state name.
    """

    def __init__(self, model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self._parameters = {name: parameters[name] for name in sorted(parameters)}
        self.frozen_round = 0
        """Last round whose change is in the frozen weights (:meth:`add_to_frozen`); 0 where they are as loaded."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live trainable parameters by state name, sorted."""
        return dict(self._parameters)

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the trainable state on the CPU, sorted by name."""
        return {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in self._parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the live parameters, all of it or nothing.

        Raises:
            ModelError: If a tensor is missing, unknown or of another shape.
        """
        missing, unknown = sorted(set(self._parameters) - set(state)), sorted(set(state) - set(self._parameters))
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which this proxy does not train"
            raise ModelError(f"the trainable state {what}; use a state made with the same trainable options")
        tensors = {name: state[name] for name in self._parameters}
        for name, tensor in tensors.items():
            own = self._parameters[name]
            if tensor.shape != own.shape:
                raise ModelError(
                    f"the trainable state's {name} has shape {tuple(tensor.shape)}, this proxy trains "
                    f"{tuple(own.shape)}; use a state made with the same trainable options"
                )
        for name, tensor in tensors.items():
            assign(self._parameters[name], tensor)

    def rebind(self, successors: Mapping[int, nn.Parameter]) -> None:
        """Take over the parameters that stand in the model now, by the ``id`` of those they stand for.

        States stay whole: of a sharded model, :meth:`state` gathers every parameter once, in all processes.
        """
        self._parameters = {name: successors[id(own)] for name, own in self._parameters.items()}

    def add_to_frozen(self, change: Mapping[str, Tensor]) -> None:
        """Add what an aggregator moved into the frozen weights: factors of a product, times s, by LoRA's names.

        Raises:
            ModelError: If a factor belongs to no layer that is trained.
        """
        if change:
            raise ModelError(
                f"there is no layer that {min(change)} could be added to; use trainable.name=lora with this aggregator"
            )

    @abstractmethod
    def merged_weights(self) -> Mapping[str, Tensor]:
        """Return the proxy's changed weights by their name in the plain proxy, float32, computed when read."""

    @abstractmethod
    def save_adapter(self, folder: str | Path, *, base: str | None = None) -> None:
        """Write the trainable state in PEFT's format.

        Args:
            folder: Folder to write to.
            base: Name or path of the proxy to note in the adapter's configuration; nothing by default.
        """

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model run without its trainable change for the length of the context."""
        yield

    def detach(self) -> PreTrainedModel:
        """Take the trainable parts off and return the plain, unchanged proxy; this object is of no use afterwards."""
        return self.model


@dataclass(frozen=True)
class Trainable(Component, ABC, family="trainable"):
    """Base of what clients train; a member's fields are its options."""

    trains: ClassVar[bool] = True
    """False for a member that trains nothing."""
    needs_float32: ClassVar[bool] = False
    """The proxy's own weights are trained, which in half precision would lose small steps."""

    @property
    def lora_scaling(self) -> float | None:
        """Scale s of LoRA's products s B A where pairs are all that the state holds, else None."""
        return None

    @property
    def key(self) -> str:
        """What asks for this in a recipe, for messages."""
        return f"trainable.name={self.name}"

    def placed(self, layer_map: LayerMap) -> "Trainable":
        """Return these options with every choice that depends on the server's layer map spelt out as block indices."""
        return self

    def check(self, target: Decoder) -> None:
        """Check that the options fit a target, of which shapes alone are there, as far as that can be known early.

        Raises:
            ConfigError: If they do not fit any proxy that is made from it.
        """

    @abstractmethod
    def attach(self, proxy: PreTrainedModel, generator: torch.Generator | None = None) -> TrainableModel:
        """Freeze the proxy, add what is trained, initialise it from the generator, and return the handle to it.

        Args:
            proxy: The model; it is changed in place.
            generator: CPU generator of the initial state; None is a fresh one of seed 0, the same for every caller.

        Raises:
            ConfigError: If the proxy lacks something that the options name.
        """

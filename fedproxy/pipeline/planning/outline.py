"""Target, proxy and what clients train, as shapes on the meta device: no weight is loaded."""

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from fedproxy.config import RunConfig
from fedproxy.data.assets import resolve
from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, LayerMap
from fedproxy.models.decoder import parameter_count
from fedproxy.models.feed_forward import WIDTH_KEYS
from fedproxy.models.loading import build, load_config
from fedproxy.modules.devices import ClientDevices
from fedproxy.pipeline.privacy import privacy_parts
from fedproxy.seeding import generator
from fedproxy.strategies.round_parts import RoundPart, Rules, parts_of
from fedproxy.strategies.round_parts.emulator import Emulator, Outlined
from fedproxy.strategies.trainable.base import TrainableModel

CALIBRATION_BATCH = 16
"""Texts per pass over calibration text."""


@dataclass(frozen=True)
class Outline:
    """The models of a run without their weights."""

    config: RunConfig
    target: Decoder
    proxy: Decoder
    """The proxy, with what clients train attached."""
    trainable: TrainableModel
    target_parameters: int
    """Tied tensors counted once, as everywhere."""
    proxy_parameters: int
    """Of the plain proxy, what clients add to it left out."""
    mapped: bool
    """The target's files have the precision that the recipe asks for, so that they are mapped and not read; taken for
    granted where they do not say."""

    @classmethod
    def of(cls, config: RunConfig) -> "Outline":
        """Build it.

        Raises:
            ModelError: If the target's shape is not to be had.
            ConfigError: If compressor, trainable or clients_per_round do not fit.
        """
        dtype = getattr(torch, config.target.dtype)
        shape = target_config(config)  # an asset may have to be made first
        mapped = getattr(shape, "dtype", None) in (None, dtype)
        with torch.device("meta"):
            target = Decoder.of(build(shape, dtype))
            proxy = build(config.compression.outline(target), dtype)
            places = tuple(config.compression.places(target))
        counts = parameter_count(target.model), parameter_count(proxy)
        options = config.trainable.placed(LayerMap(places, ""))
        trainable = options.attach(proxy, generator(config.seed))
        outline = cls(config, target, Decoder.of(proxy), trainable, *counts, mapped)
        if outline.clients_in_round > outline.clients:
            raise ConfigError(
                f"federation.clients_per_round must be at most the {outline.clients} clients there are, "
                f"got {outline.clients_in_round}"
            )
        return outline

    @property
    def weight_bytes(self) -> int:
        """Bytes of a frozen weight."""
        size: int = getattr(torch, self.config.target.dtype).itemsize
        return size

    @cached_property
    def clients(self) -> int:
        """Clients of the federation."""
        data = self.config.data
        return data.partition.count(data.tasks, data.files)

    def named(self, rows: int) -> dict[str, int]:
        """Return clients of so many rows each, by names that stand for theirs."""
        return {f"{index:09d}": rows for index in range(self.clients)}

    @property
    def clients_in_round(self) -> int:
        """Clients that take part in each round."""
        drawn = self.config.federation.clients_per_round
        return self.clients if drawn == "all" else int(drawn)

    @cached_property
    def devices(self) -> ClientDevices:
        """The devices that train one client; the machine that plans need not have them.

        Raises:
            ConfigError: If trainer.devices and trainer.strategy do not go together.
        """
        return ClientDevices.of({**self.config.trainer, "accelerator": "cpu"})

    @cached_property
    def rules(self) -> Rules:
        """What decides which parts ride with a round."""
        config = self.config
        added = [*config.parts.values(), *privacy_parts(config, self.named(1), "")]
        return Rules(config.aggregator, config.regularizer, config.realignment, self.trainable, added)

    @cached_property
    def parts(self) -> tuple[RoundPart, ...]:
        """What rides with a round, bound to shapes."""
        bound = {"emulator": Emulator(Outlined(self.trainable))}
        return tuple(bound.get(part.name, part) for part in parts_of(self.rules))

    @property
    def text(self) -> Any:
        """The configuration of the language model itself."""
        return self.target.model.config.get_text_config()

    @property
    def feed_forward_width(self) -> int:
        """Neurons of the widest feed-forward layer."""
        widths = [value for key in WIDTH_KEYS if isinstance(value := getattr(self.text, key, None), int)]
        return max(widths, default=4 * int(self.text.hidden_size))


def target_config(config: RunConfig) -> Any:
    """Return the target's architecture: from its folder, from the hub, or from the catalog of known shapes.

    Raises:
        ModelError: If none of them has it.
    """
    path = config.target.path
    local = resolve(path)
    text = resources.files("fedproxy").joinpath("catalog/architectures.yaml").read_text()
    known: dict[str, dict[str, Any]] = OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[assignment]
    if local is None and path in known:
        shape = dict(known[path])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    try:
        return load_config(local or path)
    except ModelError as error:
        raise ModelError(f"target.path: {error}; shapes known without a folder: {', '.join(known)}") from error

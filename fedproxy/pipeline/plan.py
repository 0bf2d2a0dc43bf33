"""What a recipe will take, from shapes alone: no weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.config import RunConfig, load_config
from fedproxy.data.assets import resolve
from fedproxy.errors import ModelError
from fedproxy.models import Decoder, LayerMap
from fedproxy.models.decoder import parameter_count, positions_limit
from fedproxy.models.feed_forward import WIDTH_KEYS
from fedproxy.pipeline.data import CALIBRATION_BATCH
from fedproxy.reporting.formatting import size
from fedproxy.seeding import generator

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STATE_BYTES = 4  # adapters, conflict and optimiser moments are float32


@dataclass(frozen=True)
class Plan:
    """Predicted size of a run."""

    target_parameters: int
    proxy_parameters: int
    trainable_parameters: int
    blocks: tuple[int, int]
    """Kept and all."""
    weight_bytes: int
    """Bytes per frozen parameter."""
    clients: int
    clients_in_round: int
    sends_conflict: bool
    activation_bytes: int = 0
    """What the largest batch of calibration text needs while a block runs."""

    @property
    def compression_bytes(self) -> int:
        """Most that compression holds: the target's weights, the proxy's and one block's activations."""
        return self.server_bytes + self.activation_bytes

    @property
    def upload_bytes(self) -> int:
        """Bytes that one client sends per round."""
        return self.trainable_parameters * _STATE_BYTES

    @property
    def download_bytes(self) -> int:
        """Bytes that one client receives per round, from the second on: state and, if needed, conflict."""
        return self.upload_bytes * (2 if self.sends_conflict else 1)

    @property
    def server_bytes(self) -> int:
        """Weights that the server holds while it compresses and fuses."""
        return (self.target_parameters + self.proxy_parameters) * self.weight_bytes

    @property
    def client_bytes(self) -> int:
        """What a client holds besides activations: proxy, state, its anchor and conflict, gradient, AdamW's moments."""
        copies = 6 if self.sends_conflict else 5
        return self.proxy_parameters * self.weight_bytes + copies * self.trainable_parameters * _STATE_BYTES

    def __str__(self) -> str:
        kept, depth = self.blocks
        share = 100 * self.proxy_parameters / self.target_parameters
        rows = [
            ("target", f"{self.target_parameters:,} parameters, {depth} blocks"),
            ("proxy", f"{self.proxy_parameters:,} parameters ({share:.1f} % of the target), {kept} blocks"),
            ("trained per client", f"{self.trainable_parameters:,} parameters"),
            ("clients", f"{self.clients_in_round} of {self.clients} in each round"),
            ("proxy, sent once", f"{size(self.proxy_parameters * self.weight_bytes)} to each client"),
            ("up per client and round", size(self.upload_bytes)),
            ("down per client and round", f"{size(self.download_bytes)} (first round {size(self.upload_bytes)})"),
            ("all clients, per round", f"up {size(self.upload_bytes * self.clients_in_round)}, "
                                       f"down {size(self.download_bytes * self.clients_in_round)}"),
            ("server memory", f"{size(self.server_bytes)} of weights"),
            ("compression memory", f"{size(self.compression_bytes)} at the peak, with one batch of calibration text"),
            ("client memory", f"{size(self.client_bytes)} of weights and optimiser state, activations on top"),
        ]  # fmt: skip
        return "".join(f"{name:28}{value}\n" for name, value in rows)


def plan(arguments: Sequence[str]) -> Plan:
    """Return the plan of a recipe given as ``recipe=NAME key=value ...``.

    Raises:
        ConfigError: If the recipe or an override is wrong.
        ModelError: If the target's shape is not to be had.
    """
    config = load_config(arguments)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config(config))
        decoder = Decoder.of(target)
        depth = len(decoder)
        proxy = AutoModelForCausalLM.from_config(config.compression.outline(decoder))
        kept = len(Decoder.of(proxy))
        places = tuple(config.compression.places(decoder))
    totals = parameter_count(target), parameter_count(proxy)
    options = config.trainable.placed(LayerMap(places, ""))
    trainable = options.attach(proxy, generator(config.seed)).num_parameters
    clients = config.data.partition.count(len(config.data.tasks) + len(config.data.files))
    drawn = config.federation.clients_per_round
    return Plan(
        *totals,
        trainable_parameters=trainable,
        blocks=(kept, depth),
        weight_bytes=_BYTES[config.target.dtype],
        clients=clients,
        clients_in_round=clients if drawn == "all" else int(drawn),
        sends_conflict=config.regularizer.needs_conflict,
        activation_bytes=activation_bytes(decoder, config),
    )


def activation_bytes(decoder: Decoder, config: RunConfig) -> int:
    """Return what one batch of calibration text needs while a block runs and its output is compared with its input.

    Counted: four hidden states in the model's precision and three in float32, and three inner feed-forward states.
    """
    text = decoder.model.config.get_text_config()
    widths = [value for key in WIDTH_KEYS if isinstance(value := getattr(text, key, None), int)]
    tokens = CALIBRATION_BATCH * positions_limit(decoder.model, config.compression.calibration.max_tokens)
    inner = max(widths, default=4 * text.hidden_size)
    size_of = _BYTES[config.target.dtype]
    return int(tokens * ((4 * text.hidden_size + 3 * inner) * size_of + 3 * text.hidden_size * 4))


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
        return AutoConfig.from_pretrained(str(local or path))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"target.path={path}: no shape to plan with; give a local folder or one of {', '.join(known)}"
        ) from error

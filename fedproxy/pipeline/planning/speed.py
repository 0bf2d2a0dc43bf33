"""Seconds of a round, from operations counted on shapes and rates that are given or measured."""

import math
import time
from dataclasses import dataclass, replace

import torch

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder
from fedproxy.models.decoder import parameter_count
from fedproxy.models.loading import build
from fedproxy.pipeline.planning.hardware import MEASURE, Hardware
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.pipeline.planning.traffic import Traffic
from fedproxy.seeding import generator
from fedproxy.strategies.trainable.base import TrainableModel
from fedproxy.strategies.trainable.blocks import BlockwiseTrainable
from fedproxy.strategies.trainable.lora import Lora
from fedproxy.strategies.trainable.lora_places import ALL_LINEAR

_MBIT = 1e6 / 8
_PROBE_TOKENS, _PROBES = 256, 3


@dataclass(frozen=True)
class RowLength:
    """Tokens of a row."""

    input_tokens: int
    target_tokens: int

    @classmethod
    def of(cls, hardware: Hardware, outline: Outline) -> "RowLength":
        """Return the lengths that are given, else the longest that the recipe allows."""
        data = outline.config.data
        return cls(hardware.input_tokens or data.max_input_tokens, hardware.target_tokens or data.max_target_tokens)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.input_tokens + self.target_tokens


@dataclass(frozen=True)
class Seconds:
    """Predicted wall time of one round."""

    devices: int
    """Devices that the clients of a round share."""
    tflops: float
    """Sustained rate of a device in training."""
    client: float | None
    """One client's training; None where its rows are not known."""
    clients: float | None
    """All clients of the round on the given devices."""
    transfer: float
    """Broadcasts down and updates up."""
    merge: float
    """Aggregation."""
    proxy: float
    """Sending the proxy to all clients, once."""

    @property
    def round(self) -> float | None:
        """A whole round, from the second on."""
        return None if self.clients is None else self.clients + self.transfer + self.merge

    @classmethod
    def of(cls, outline: Outline, traffic: Traffic, hardware: Hardware) -> "Seconds":
        """Count operations and bytes and divide them by the rates.

        Raises:
            ConfigError: If the given devices are fewer than those of one client.
        """
        trains = outline.trainable.num_parameters > 0
        given = 0.0 if hardware.tflops == MEASURE else float(hardware.tflops)
        tflops = measured_tflops(outline) if trains and not given else given
        rows, client = rows_per_client(outline, hardware), None if trains else 0.0
        if rows is not None and trains:
            operations = training_operations(outline.proxy, outline.trainable, RowLength.of(hardware, outline))
            client = outline.config.client.rows_seen(rows) * operations * _share(outline) / (tflops * 1e12)
        devices = _devices(outline, hardware)
        turns = math.ceil(traffic.drawn / (devices // outline.devices.count))
        return cls(
            devices=devices,
            tflops=tflops,
            client=client,
            clients=None if client is None else turns * client,
            transfer=_transfer(traffic.down(2), traffic.all_down(2), hardware)
            + _transfer(traffic.up, traffic.all_up(), hardware),
            merge=traffic.all_up() / (hardware.merge_gb_per_s * 1e9),
            proxy=_transfer(traffic.proxy, traffic.proxy * traffic.clients, hardware),
        )


def _devices(outline: Outline, hardware: Hardware) -> int:
    """Return how many devices a round's clients share."""
    each = outline.devices.count
    if hardware.devices is None:
        return each
    if hardware.devices < each:
        raise ConfigError(
            f"plan.devices must be at least the {each} devices that train one client together (trainer.devices), "
            f"got {hardware.devices}"
        )
    return hardware.devices


def _share(outline: Outline) -> float:
    """Return the part of a batch that the busiest of a client's devices takes."""
    rows = outline.config.client.batch_size
    return math.ceil(rows / outline.devices.count) / rows


def rows_per_client(outline: Outline, hardware: Hardware) -> int | None:
    """Return the rows of an average client, rounded up; None where the recipe takes all rows there are."""
    data = outline.config.data
    if hardware.rows is not None or data.rows_per_task is None:
        return hardware.rows
    return math.ceil(data.rows_per_task * (len(data.tasks) + len(data.files)) / outline.clients)


def training_operations(proxy: Decoder, trainable: TrainableModel, row: RowLength) -> float:
    """Return the floating-point operations of one training step for one row.

    Forward: two per weight and token. Backward: two per weight and token for the inputs' gradients, from the lowest
    trained block up, and two per trained weight. Attention: 4 d per pair of tokens forward and twice that backward,
    over the causal half of pairs. The vocabulary head works at answer tokens alone and is not trained. All experts
    of a mixture count.
    """
    trained = {id(parameter) for parameter in trainable.parameters().values()}
    blocks = proxy.blocks
    touched = [i for i, block in enumerate(blocks) if not trained.isdisjoint(map(id, block.parameters()))]
    lowest = min(touched, default=0)
    above = sum(parameter_count(block) for block in blocks[lowest:])
    weights = 2.0 * (parameter_count(blocks) + above + trainable.num_parameters)
    text = proxy.model.config.get_text_config()
    heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    width = heads * int(getattr(text, "head_dim", None) or hidden // heads)
    pairs = row.tokens * (row.tokens + 1) / 2
    attention = 4.0 * width * pairs * (len(blocks) + 2 * (len(blocks) - lowest))
    return weights * row.tokens + attention + 4.0 * int(text.vocab_size) * hidden * row.target_tokens


def measured_tflops(outline: Outline, tokens: int = _PROBE_TOKENS) -> float:
    """Return the TFLOP/s of training steps on two blocks of the target, random weights, on this machine's device.

    The best of a few steps after a first one; the accelerator where there is one, unless the recipe stays on the CPU.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = found is None or outline.config.trainer.get("accelerator") == "cpu"
    device = torch.device("cpu") if on_cpu or found is None else found
    with torch.random.fork_rng():
        two = build(outline.target.subset_config([0, 0]), getattr(torch, outline.config.target.dtype))
    options = outline.config.trainable
    everywhere = replace(options, blocks="all") if isinstance(options, BlockwiseTrainable) else options
    if isinstance(everywhere, Lora):  # whatever kind of block these two are
        everywhere = replace(everywhere, modules=(ALL_LINEAR,), parameters=())
    model = everywhere.attach(two, generator(0))
    two.to(device).train()
    decoder = Decoder.of(two)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    seconds = []
    for _ in range(_PROBES + 1):
        started = time.perf_counter()
        decoder.body(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return training_operations(decoder, model, RowLength(tokens, 0)) / min(seconds[1:]) / 1e12


def _transfer(each: int, together: int, hardware: Hardware) -> float:
    """Return the seconds until every client has its message: the slower of the clients' links and the server's."""
    if hardware.client_mbps is None:
        return 0.0
    return max(each / (hardware.client_mbps * _MBIT), together / (hardware.server_mbps * _MBIT))

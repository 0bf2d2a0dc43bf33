"""Peak memory of every role, from shapes alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedproxy.evaluation.decoding import SLOTS, most_cached
from fedproxy.evaluation.evaluators.own_data import OwnData
from fedproxy.federation.engines.flower import Flower
from fedproxy.models.decoder import Decoder, positions_limit
from fedproxy.modules.divergence import CHUNK_ELEMENTS
from fedproxy.pipeline.planning.outline import CALIBRATION_BATCH, Outline
from fedproxy.pipeline.planning.speed import RowLength
from fedproxy.pipeline.planning.traffic import Traffic
from fedproxy.protocol import nbytes
from fedproxy.strategies.round_parts.emulator import emulator_weights
from fedproxy.strategies.trainable.weights import WeightsModel

SERVER_PROCESS, CLIENT_PROCESS = 665 * 2**20, 450 * 2**20
"""Resident bytes of Python with the libraries that a role imports, before it loads a model (measured, Linux, CPU)."""
_FLOWER_PROCESS = 100 * 2**20
_FLOWER_PARTS = {"a site's relay": 5, "a site's SuperNode": 3, "the hub's relay": 4, "the SuperLink": 7}
"""How many parts of a file each of Flower's processes holds at its peak, while a message carries one (measured)."""
_ROUNDED_BYTES = {"8bit": 1.0, "4bit": 0.52}
"""Bytes of a quantised weight; in 4 bits with its share of the scales, themselves quantised."""
_LOGITS_BYTES = 2**28
"""Most logits that evaluation holds at once."""
_LOGITS_COPIES = 6
"""Both models' logits and what becomes of them, where distributions are compared."""


@dataclass(frozen=True)
class Need:
    """What a role holds at once in one of its stages, Python and its libraries left out."""

    role: str
    stage: str
    total: int
    """Bytes, wherever they lie."""
    device: int
    """Those of them that lie on an accelerator, where the role has one."""
    devices: int = 1
    """Accelerators that hold them in equal parts."""


def needs(outline: Outline, traffic: Traffic, row: RowLength) -> list[Need]:
    """Return the peak of every stage of every role.

    What ``fit`` does is counted, without healing. Weights that are mapped from files count where they are used; of
    stages that go over them block by block, one block does.
    """
    (training, on_device), loading = _training(outline, traffic, row), _loading(outline)
    target = outline.target_parameters * outline.weight_bytes
    proxy = outline.proxy_parameters * outline.weight_bytes
    inside, devices = outline.config.engine.name == "in_process", outline.devices.count
    received = _received(outline, traffic, in_memory=inside)
    # Rounded weights are a model of their own, and so are those of a client's own processes.
    shared = proxy if outline.config.client.quantization == "none" and devices == 1 else 0
    kept, aligning = _aligned(outline)
    clients = max(training, loading) - shared if inside else 0
    federation = proxy + received + kept + max(clients + _fused_between_rounds(outline), aligning)
    found = [
        *_couriers(outline, traffic),
        Need("server", "compression", _compression(outline, target, proxy), target + calibration_bytes(outline)),
        *_distillation(outline, proxy),
        Need("server", "federation", federation, on_device if inside else 0, devices if inside else 1),
        *_after(outline, target, proxy),
        *([Need("client", "loading", loading, 0)] if loading else []),
        Need("client", "training", training, on_device, devices),
    ]
    # A worker whose client has processes of its own holds no proxy, only what goes to them and what comes back.
    passed_on = traffic.down(2) + traffic.up if devices > 1 else 0
    return found if inside else [*found, Need("each worker", "training", training + passed_on, on_device, devices)]


def _compression(outline: Outline, target: int, proxy: int) -> int:
    """Return what compression holds: the whole target while blocks are scored, and then the proxy beside it.

    The proxy is cut, compared and saved with one block of a mapped target in memory.
    """
    scoring = target + calibration_bytes(outline)
    if not outline.mapped:
        return scoring + proxy
    return max(scoring, proxy + _read_by_block(outline))


def _read_by_block(outline: Outline) -> int:
    """Return what the target takes where its blocks are let go as they have run."""
    if not outline.mapped:
        return outline.target_parameters * outline.weight_bytes
    return _outside(outline.target) + max(map(_weights, outline.target.blocks))


def _distillation(outline: Outline, proxy: int) -> list[Need]:
    """Return what distillation holds: the target as it is read, and the proxy with what training it takes."""
    settings = outline.config.distillation
    if not settings.steps:
        return []
    named = outline.proxy.blocks.named_modules()
    linear = [module for name, module in named if isinstance(module, nn.Linear) and "lora_" not in name]
    width = sum(sum(module.weight.shape) for module in linear)
    # Gradients and two moments; LoRA's own values too.
    state = 3 * _weights(outline.proxy.blocks) if settings.train == "full" else 16 * settings.lora_r * width
    total = proxy + state + _imitating(outline, settings.batch_size) + _read_by_block(outline)
    return [Need("server", "distillation", total, total)]


def _aligned(outline: Outline) -> tuple[int, int]:
    """Return what re-alignment adds to a round: always, and while the server aligns.

    Always the emulator as first sent, of the round before and of this one; and then its gradients and two moments.
    """
    batch = outline.config.realignment.reads[1]
    if not batch:
        return 0, 0
    emulator = nbytes(emulator_weights(outline.trainable))
    return 3 * emulator, 3 * emulator + _read_by_block(outline) + _imitating(outline, batch)


def _imitating(outline: Outline, batch: int) -> int:
    """Return what a step of the proxy's training on the target's outputs needs beside weights and their state."""
    tokens = positions_limit(outline.target.model, outline.config.compression.calibration.max_tokens)
    logits = min(CHUNK_ELEMENTS, batch * tokens * int(outline.text.vocab_size))
    return saved_bytes(outline, batch, tokens) + _LOGITS_COPIES * 4 * logits


def _fused_between_rounds(outline: Outline) -> int:
    """Return what the target adds where rounds are scored by the fused model."""
    validation = outline.config.federation.validation
    fused = validation.every and validation.model == "fused"
    return outline.target_parameters * outline.weight_bytes + _moved(outline) if fused else 0


def _couriers(outline: Outline, traffic: Traffic) -> list[Need]:
    """Return what Flower's processes hold, libraries included, while files pass in parts."""
    engine = outline.config.engine
    if not isinstance(engine, Flower):
        return []
    part = min(engine.part_mb << 20, max(traffic.proxy, traffic.all_down(1), traffic.all_up()))
    return [Need(who, "a part", count * part + _FLOWER_PROCESS, 0) for who, count in _FLOWER_PARTS.items()]


def _loading(outline: Outline) -> int:
    """Return what the processes of a client hold before they spread its weights: each reads all of them."""
    devices = outline.devices
    return devices.count * outline.proxy_parameters * outline.weight_bytes if devices.strategy == "fsdp" else 0


def calibration_bytes(outline: Outline) -> int:
    """Return what one batch of calibration text needs while a block runs and its output is compared with its input.

    Counted: four hidden states in the model's precision and three in float32, and three inner feed-forward states.
    """
    tokens = CALIBRATION_BATCH * positions_limit(
        outline.target.model, outline.config.compression.calibration.max_tokens
    )
    return _forward_bytes(outline, tokens) + tokens * 3 * int(outline.text.hidden_size) * 4


def _forward_bytes(outline: Outline, tokens: int) -> int:
    """Return what a block needs that runs without gradients."""
    width, inner = int(outline.text.hidden_size), outline.feed_forward_width
    return tokens * (4 * width + 3 * inner) * outline.weight_bytes


def _received(outline: Outline, traffic: Traffic, *, in_memory: bool) -> int:
    """Return what the server holds of a round beside its models: updates, state, what it broadcasts and merges.

    Updates that come as files (the engine ``workers``) are read one tensor at a time.
    """
    largest = max((p.numel() * 4 for p in outline.trainable.parameters().values()), default=0)
    updates = traffic.drawn * (traffic.up if in_memory else largest)
    kept = 3 * (traffic.later["state"] + traffic.collected)
    return updates + kept + sum(part.server_copies * traffic.later.get(part.name, 0) for part in traffic.parts)


def _after(outline: Outline, target: int, proxy: int) -> list[Need]:
    """Return the needs of fusion and evaluation, which hold one model at a time.

    A fused model has new tensors for what moved, and the target's own for the rest.
    """
    config, merged = outline.config, dict(outline.trainable.merged_weights())
    changed = sum(weight.numel() for weight in merged.values()) * outline.weight_bytes
    kept = nbytes(merged) if isinstance(outline.trainable, WeightsModel) else 0  # others are merged when they are read
    joined = target + 2 * proxy + changed if config.fusion.adds_logits else target
    twice = 0 if outline.mapped else _moved(outline)
    work = 4 * max((weight.numel() * 4 for weight in merged.values()), default=0)
    found = [Need("server", "fusion", kept + joined + twice + work, 0)]
    sizes = {"target": target, "proxy": proxy, "proxy_tuned": proxy + changed, "fused": joined}
    scored = max((sizes[name] for name in config.evaluation.models), default=0)
    if scored:
        tokens, vocabulary = config.evaluation.batch_tokens, int(outline.text.vocab_size)
        work = _forward_bytes(outline, tokens) + min(_LOGITS_BYTES, tokens * vocabulary * 4)
        work += min(_answered(outline), most_cached(scored))
        found.append(Need("server", "evaluation", kept + scored + work, scored + work))
    return found


def _answered(outline: Outline) -> int:
    """Return the keys and values of as many answers to one's own rows as are generated side by side."""
    config, shape = outline.config, outline.text
    asks = config.data.holdout is not None or config.evaluation.files
    longest = [own.max_new_tokens for own in config.evaluation.members.values() if isinstance(own, OwnData)]
    if not asks or not any(longest):
        return 0
    heads = getattr(shape, "num_key_value_heads", None) or int(shape.num_attention_heads)
    width = getattr(shape, "head_dim", None) or int(shape.hidden_size) // int(shape.num_attention_heads)
    token = 2 * len(outline.target) * int(heads) * int(width) * outline.weight_bytes
    return SLOTS * token * (config.data.max_input_tokens + max(longest))


def _moved(outline: Outline) -> int:
    """Return the bytes of the target's weights that fusion moves."""
    blocks = _weights(outline.target.blocks)
    return (
        0
        if outline.config.fusion.adds_logits
        else blocks * min(len(outline.proxy), len(outline.target)) // len(outline.target)
    )


def _outside(decoder: Decoder) -> int:
    """Return the bytes of what belongs to no block."""
    return _weights(decoder.model) - _weights(decoder.blocks)


def _training(outline: Outline, traffic: Traffic, row: RowLength) -> tuple[int, int]:
    """Return what a client holds while it trains, in all and on its accelerators, all of its devices together."""
    count, spread = outline.devices.count, outline.devices.strategy == "fsdp"
    state = sum(p.numel() * p.element_size() for p in outline.trainable.parameters().values())
    proxy = _clients_proxy(outline)
    # On the device: the parameters, their gradients, the optimiser's state, the anchor, and what the regularizer reads.
    device_copies = 3 + sum(part.device_copies for part in traffic.parts)
    device_copies += outline.devices.strategy == "ddp"  # the buckets in which gradients are averaged
    # On the host: the initial state, the broadcast, the tuned state; and a memory before and after the round.
    host_copies = 3 + sum(part.host_copies for part in traffic.parts)
    rows = math.ceil(outline.config.client.batch_size / count)
    privacy = outline.config.privacy
    if privacy.unit == "example" and privacy.physical_batch:
        rows = min(rows, privacy.physical_batch)
    logits = rows * row.target_tokens * int(outline.text.vocab_size) * (outline.weight_bytes + 8)
    weights = proxy + device_copies * state + int(outline.config.client.optimizer.state_copies * state)
    if spread:
        weights = weights // count + _gathered(outline)
    device = weights + _saved(outline, rows, row) + logits
    statistics = traffic.up - traffic.sent["delta"] - traffic.sent.get("control_variates", 0)
    return count * (device + host_copies * state) + statistics, count * device


def _gathered(outline: Outline) -> int:
    """Return the bytes of whole weights on a device that holds a part of all.

    Counted: the block that runs and the next one, and what belongs to no block.
    """
    blocks = [_weights(block) for block in outline.proxy.blocks]
    return 2 * max(blocks) + _outside(outline.proxy)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _clients_proxy(outline: Outline) -> int:
    """Return the bytes of the frozen proxy that clients train on."""
    whole, bits = outline.proxy_parameters * outline.weight_bytes, outline.config.client.quantization
    if bits == "none":
        return whole
    adapters = {id(parameter) for parameter in outline.trainable.parameters().values()}
    rounded = sum(
        module.weight.numel()
        for module in outline.proxy.blocks.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in adapters
    )
    return whole - int(rounded * (outline.weight_bytes - _ROUNDED_BYTES[bits]))


def _saved(outline: Outline, batch: int, row: RowLength) -> int:
    """Return what autograd keeps of a batch; under checkpointing, the blocks' inputs and one block's own."""
    blocks = len(outline.proxy)
    saved = saved_bytes(outline, batch, row.tokens)
    if not outline.config.client.gradient_checkpointing:
        return saved
    inputs = blocks * batch * row.tokens * int(outline.text.hidden_size) * outline.weight_bytes
    return min(saved, inputs + saved // blocks)


def saved_bytes(outline: Outline, batch: int, tokens: int) -> int:
    """Return the bytes that autograd keeps between a forward and a backward pass of the proxy's body.

    The forward runs on the meta device, and what it saves is counted: storages once, weights and attention weights
    left out, since fused attention does not keep them. A family whose forward needs real numbers is counted by
    formula: per block and token eight hidden and four inner feed-forward states.
    """
    model = outline.proxy.model
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights and tensor.shape[-2:] != (tokens, tokens):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    # A mask of four dimensions is taken as it is, without a look at its values.
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype, device="meta")
    model.train()
    try:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            outline.proxy.body(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        per_token = 8 * int(outline.text.hidden_size) + 4 * outline.feed_forward_width
        return batch * tokens * per_token * len(outline.proxy) * outline.weight_bytes
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

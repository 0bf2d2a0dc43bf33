"""FedBiOT's re-alignment of the emulator on public text, the adapter fixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, placed
from fedproxy.models.decoder import set_weights, share_weights
from fedproxy.models.streaming import released_by_block
from fedproxy.strategies.realignment.base import Material, Realignment
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class EmulatorRealignment(Realignment, name="emulator"):
    """Minimises sum_l ||E_l - E*_l||^2 / RMS(E_l)^2 + kl_weight * KL(M || M*) over the emulator's weights.

    FedBiOT (Wu et al. 2024, KDD, arXiv 2406.17706). E_l is the target's hidden state behind kept block l, E*_l the
    proxy's; M is the target and M* the proxy, both with the current adapter (the blocks that clients train), which is
    not changed.

    Choice: the squared distance is a mean over hidden units, and the root mean square is taken per token, as in
    :func:`fedproxy.modules.losses.hidden_distance`; the optimiser is a fresh AdamW every round.
    """

    parts: ClassVar[tuple[str, ...]] = ("emulator",)

    steps: int = 20
    """Optimiser steps per round."""
    lr: float = 1e-4
    """Learning rate of AdamW, constant."""
    kl_weight: float = 1.0
    """Weight lambda of KL(M || M*), beside the sum over blocks."""
    rows: int = 200
    """Rows of compression.calibration.path to align on."""
    batch_size: int = 16
    """Texts per step."""

    def __post_init__(self) -> None:
        """Check the options."""
        for key in ("steps", "rows", "batch_size"):
            self.require(key, getattr(self, key) >= 1, "at least 1")
        self.require("lr", self.lr > 0, "positive")
        self.require("kl_weight", self.kl_weight >= 0, "at least 0")

    @property
    def reads(self) -> tuple[int, int]:
        """Rows and batch size."""
        return self.rows, self.batch_size

    def align(
        self, model: TrainableModel, emulator: Sequence[int], material: Material, generator: torch.Generator
    ) -> float | None:
        """Train the emulator's blocks and return the mean loss of the last ten steps.

        Raises:
            ConfigError: If the proxy is in half precision.
            ModelError: If the proxy does not fit the target.
        """
        # Lightning is imported where it is used: components are read by every command.
        from fedproxy.data.batching import ShuffledBatches
        from fedproxy.modules.distillation import DistillationModule, check_pair, check_tokens, require_float32
        from fedproxy.modules.teacher import Teacher
        from fedproxy.modules.trainer import fit, make_trainer

        proxy, layer_map = model.model, material.layer_map
        if layer_map.neurons is not None:
            raise ModelError("realignment.name=emulator compares whole blocks, but this proxy's blocks lost neurons")
        check_pair(proxy, material.target, layer_map.proxy_to_target)
        check_tokens(proxy, material.batches)
        require_float32(proxy, "realignment.name=emulator", "realignment.name=none")
        others = layer_map.counterparts(len(Decoder.of(material.target)))
        pairs = [(own, others[own]) for own in emulator]
        whole = with_adapter(material.target, model, emulator, layer_map.proxy_to_target)
        blocks = Decoder.of(proxy).blocks
        tuned = [parameter for own in emulator for parameter in blocks[own].parameters()]
        training = {id(parameter) for parameter in proxy.parameters() if parameter.requires_grad}
        proxy.eval().requires_grad_(False)
        for parameter in tuned:
            parameter.requires_grad_(True)
        seed = int(torch.randint(2**62, (), generator=generator))
        try:
            runner = make_trainer(
                material.trainer, max_epochs=-1, max_steps=self.steps, max_grad_norm=1.0, root=material.logs
            )
            with placed(whole, runner.strategy.root_device), released_by_block(whole):  # it shares the target's tensors
                module = DistillationModule(
                    proxy,
                    Teacher(whole, sorted({other for _, other in pairs}), distributions=self.kl_weight > 0),
                    tuned,
                    lr=self.lr,
                    pairs=pairs,
                    kl_weight=self.kl_weight,
                    hidden_weight=float(len(pairs)),  # the module takes the mean over pairs, FedBiOT the sum
                )
                fit(runner, module, ShuffledBatches(material.batches, generator), seed=seed)
        finally:
            for parameter in proxy.parameters():
                parameter.requires_grad_(id(parameter) in training)
        return module.last_loss


def with_adapter(
    target: PreTrainedModel, model: TrainableModel, emulator: Sequence[int], proxy_to_target: Sequence[int]
) -> PreTrainedModel:
    """Return M: the target with the proxy's adapter blocks, as they are now, in their places.

    Args:
        target: Left as it is; weights that do not differ are shared.
        model: The proxy with its trained part at its current values.
        emulator: Indices of the proxy's blocks that are no adapter.
        proxy_to_target: pi, the target's block behind each block of the proxy.

    Raises:
        ConfigError: If two adapter blocks have one place.
    """
    decoder, merged, own = Decoder.of(target), model.merged_weights(), dict(model.model.state_dict())
    prefix = Decoder.of(model.model).prefix
    weights: dict[str, Tensor] = {}
    for new, old in enumerate(proxy_to_target):
        if new in emulator:
            continue
        for name in decoder.weight_names(old):
            source, goal = f"{prefix}.{new}.{name}", decoder.full_name(old, name)
            if goal in weights:
                raise ConfigError(
                    f"realignment.name=emulator: clients train two copies of target block {old}; train one of them "
                    "(trainable.blocks) or use realignment.name=none"
                )
            weight = merged[source] if source in merged else _plain(own, source)
            weights[goal] = weight.to(decoder.model.dtype).clone()
    whole = share_weights(target)
    set_weights(whole, weights)
    return whole


def _plain(state: dict[str, Tensor], name: str) -> Tensor:
    """Return a weight by its plain name, wherever an adapter has moved it to."""
    if name in state:
        return state[name]
    layer, _, leaf = name.rpartition(".")
    return state[f"{layer}.base_layer.{leaf}"]

"""The decoder stack of a causal language model, found by its structure and not by its class."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.errors import ModelError, first_line
from fedproxy.models.checkpoints import without_reports
from fedproxy.models.layer_map import LayerMap
from fedproxy.models.positions import positions

OTHER_PARTS = "keep other blocks (compression.keep) or choose compression.name=none"


@dataclass(frozen=True)
class Decoder:
    """View of a causal language model as embedding, blocks, final norm and head."""

    model: PreTrainedModel
    body: nn.Module
    """The model without its vocabulary head; calling it runs embedding, blocks and final norm."""
    blocks: nn.ModuleList
    prefix: str
    """Name of ``blocks`` inside ``model``, e.g. ``model.layers``."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Decoder":
        """Find the stack of blocks.

        Raises:
            ModelError: If the model is not a decoder-only language model with one stack of blocks.
        """
        kind = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"target.path: {kind} is an encoder-decoder model; FedProxy needs a decoder-only causal LM"
            )
        if model.get_output_embeddings() is None:
            raise ModelError(f"target.path: {kind} has no language model head; FedProxy needs a decoder-only causal LM")
        body = model.get_decoder()
        depth = model.config.get_text_config().num_hidden_layers
        stacks = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == depth
            and not any(p.isdigit() for p in name.split("."))
        ]
        if len(stacks) != 1:
            raise ModelError(
                f"target.path: {kind} has {len(stacks)} stacks of {depth} blocks; FedProxy needs exactly one"
            )
        prefix, blocks = stacks[0]
        return cls(model, body, blocks, prefix)

    def __len__(self) -> int:
        return len(self.blocks)

    def weight_names(self, index: int) -> tuple[str, ...]:
        """Return the names, inside block ``index``, of its parameters and saved buffers."""
        return tuple(self.blocks[index].state_dict())

    def full_name(self, index: int, name: str) -> str:
        """Return the model-wide name of a block's weight."""
        return f"{self.prefix}.{index}.{name}"

    def block_index(self, name: str) -> int | None:
        """Return which block a weight's model-wide name lies in, or None if in none."""
        rest = name.removeprefix(f"{self.prefix}.")
        return None if rest == name else int(rest.partition(".")[0])

    def subset(self, kept: Sequence[int]) -> PreTrainedModel:
        """Build a model of the same class from the blocks ``kept``, in that order, with copied weights.

        Block indices, per-layer configuration lists (attention types, for example) and caches are renumbered, so the
        result is an ordinary checkpoint of a shallower model.
        """
        source = self.model.state_dict()
        state = copied({name: tensor for name, tensor in source.items() if self.block_index(name) is None})
        for new, old in enumerate(kept):  # a block that is kept twice is copied twice: its places may be tuned apart
            names = self.weight_names(old)
            block = copied({name: source[self.full_name(old, name)] for name in names})
            state |= {self.full_name(new, name): tensor for name, tensor in block.items()}
        return self.rebuilt(self.subset_config(kept), state)

    def rebuilt(self, config: Any, state: dict[str, Tensor]) -> PreTrainedModel:
        """Build a model of the same class from a configuration and all of its weights, which become the model's own.

        Raises:
            ModelError: If configuration and weights do not fit each other.
        """
        kind = type(self.model)
        try:
            with without_reports():
                built, info = kind.from_pretrained(
                    None,
                    config=config,
                    state_dict=state,
                    dtype=self.model.dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # listed, as all that does not fit
                )
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{kind.__name__} cannot be rebuilt from parts of its weights: {first_line(error)}; {OTHER_PARTS}"
            ) from error
        other = [name for name, *_ in info["mismatched_keys"]]
        lost = sorted({*info["missing_keys"], *other}) + sorted(info["unexpected_keys"])
        if lost:
            raise ModelError(
                f"{kind.__name__} cannot be rebuilt from {len(state)} weights: {lost[0]} was lost; {OTHER_PARTS}"
            )
        built.generation_config = copy.deepcopy(self.model.generation_config)
        model: PreTrainedModel = built.to(self.model.device).eval()
        return model

    def subset_config(self, kept: Sequence[int]) -> Any:
        """Return the configuration of a model of the blocks ``kept``: their number and per-layer lists, no origin."""
        config = copy.deepcopy(self.model.config)
        config._name_or_path = ""
        text = config.get_text_config()
        depth = text.num_hidden_layers
        per_layer = {
            name: [value[i] for i in kept]
            for name, value in text.to_dict().items()
            if isinstance(value, list) and len(value) == depth
        }
        text.num_hidden_layers = len(kept)
        for name, value in per_layer.items():
            setattr(text, name, value)
        return config


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of named tensors; what is one tensor under several names (tied) is copied once and stays one."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.clone()
        found[name] = copies[place]
    return found


def hidden_state(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the hidden state, (batch, tokens, hidden), from what a block's forward returned."""
    return output if isinstance(output, Tensor) else output[0]


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters, tied tensors counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def disclosed_count(proxy: PreTrainedModel, layer_map: LayerMap) -> int:
    """Return the number of different target parameters in a proxy: blocks that are there more than once count once."""
    blocks = Decoder.of(proxy).blocks
    copies = (blocks[index] for index in range(len(blocks)) if index not in layer_map.centres)
    return parameter_count(proxy) - sum(parameter_count(block) for block in copies)


def positions_limit(model: PreTrainedModel, wanted: int) -> int:
    """Return the longest text that both the recipe and the model's positions allow."""
    return min(wanted, positions(model.config) or wanted)


@torch.no_grad()
def set_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Replace named parameters and buffers by new tensors, without touching the old ones (others may hold them)."""
    for name, tensor in weights.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model over the same tensors: it costs no memory until :func:`set_weights` replaces some."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})

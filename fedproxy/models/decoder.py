"""The decoder stack of a causal language model, found by its structure and not by its class."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedproxy.errors import ModelError, first_line, one_line
from fedproxy.models.block_fields import cut_fields, cut_slices, depth_of
from fedproxy.models.checkpoints import without_reports
from fedproxy.models.layer_map import LayerMap
from fedproxy.models.mapped import release
from fedproxy.models.positions import positions
from fedproxy.models.structure import check_structure

_CAUSE = 160
"""Most characters of what a library says about a failure, inside of a line of our own."""
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
        depth = depth_of(model.config.get_text_config())
        if depth is not None and depth < 1:
            raise ModelError(f"target.path: {kind} has {depth} blocks; FedProxy needs one at least")
        stacks = _stacks(model, depth)
        if not stacks:
            raise ModelError(
                f"target.path: {kind} has no single stack of {depth} blocks; FedProxy needs a model that runs each of "
                "its blocks once, in their order"
            )
        prefix, blocks = max(stacks, key=lambda stack: parameter_count(stack[1]))
        # A family may call another part its decoder (ModernBERT's is the head).
        body = next(part for part in (model.get_decoder(), model.base_model, model) if _holds(part, blocks))
        return cls(model, body, blocks, prefix)

    def __len__(self) -> int:
        """Return the number of blocks."""
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
        config = self.subset_config(kept)
        self._check_outline(config, kept)
        source, depth = self.model.state_dict(), len(self)
        outside = {name: tensor for name, tensor in source.items() if self.block_index(name) is None}
        state = copied({name: cut_slices(name, tensor, kept, depth) for name, tensor in outside.items()})
        for new, old in enumerate(kept):  # a block that is kept twice is copied twice: its places may be tuned apart
            names = self.weight_names(old)
            block = copied({name: source[self.full_name(old, name)] for name in names})
            state |= {self.full_name(new, name): tensor for name, tensor in block.items()}
            release()
        return self.rebuilt(config, state)

    def _check_outline(self, config: Any, kept: Sequence[int]) -> None:
        """Check, without weights, that blocks built from a configuration are those that the proxy is to have.

        Raises:
            ModelError: If they are not, or the family refuses the configuration.
        """
        kind = type(self.model)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), without_reports():
                own = Decoder.of(kind._from_config(config, dtype=self.model.dtype)).blocks
        except Exception as error:  # a family's own checks raise whatever they like
            raise ModelError(
                f"{kind.__name__} cannot be built from blocks {list(kept)}: {_cause(error)}; {OTHER_PARTS}"
            ) from error
        check_structure(kind.__name__, list(own), list(self.blocks), kept)

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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a family's own checks raise whatever they like
            raise ModelError(
                f"{kind.__name__} cannot be rebuilt from parts of its weights: {_cause(error)}; {OTHER_PARTS}"
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
        """Return the configuration of a model of the blocks ``kept``, without its origin.

        Raises:
            ModelError: If there is none that says which of them are of which kind, also after saving and loading.
        """
        config = copy.deepcopy(self.model.config)
        config._name_or_path = ""
        try:
            with without_reports():
                cut_fields(config.get_text_config(), kept, len(self))
                read_back = type(config).from_dict(config.to_diff_dict())
        except ModelError:
            raise
        except Exception as error:  # a family's own checks raise whatever they like
            raise ModelError(
                f"{type(self.model).__name__} has no configuration for blocks {list(kept)}: {_cause(error)}; "
                f"{OTHER_PARTS}"
            ) from error
        before, after = (_numbers_plain(part.get_text_config().to_dict()) for part in (config, read_back))
        changed = [name for name in after if after[name] != before.get(name)]
        if changed and tuple(kept) != tuple(range(len(self))):
            raise ModelError(
                f"{type(self.model).__name__} reads {changed[0]} of blocks {list(kept)} back as {after[changed[0]]}; "
                f"{OTHER_PARTS}"
            )
        return config


def _cause(error: Exception) -> str:
    return one_line(first_line(error), _CAUSE)


def _numbers_plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _holds(part: nn.Module, blocks: nn.Module) -> bool:
    return any(module is blocks for module in part.modules())


def _stacks(model: PreTrainedModel, depth: int | None) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of ``depth`` modules, with their names, that belong to the language model itself.

    What lies in a part with a configuration of another class (a vision or audio tower) is none of them, and neither is
    what lies inside of a block.
    """
    text = type(model.config.get_text_config())
    towers = [
        f"{name}."
        for name, module in model.named_modules()
        if name
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and isinstance(module, PreTrainedModel)
        and type(module.config) is not text
        and not any(isinstance(getattr(part, "config", None), text) for part in module.modules())
    ]
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not any(part.isdigit() for part in name.split("."))
        and not name.startswith(tuple(towers))
    ]


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


class Overlay(Mapping[str, Tensor]):
    """Named weights of which some are others, which may be computed when they are read.

    Args:
        weights: All weights by name.
        others: What stands in their place, and further ones.
    """

    def __init__(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        self._weights, self._others = weights, others
        self._names = dict.fromkeys([*weights, *others])

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its name in the model, the overlaid one where there is one."""
        return self._others[name] if name in self._others else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all tensors."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model over the same tensors, in evaluation mode.

    It costs no memory until :func:`set_weights` replaces some.
    """
    tensors = [*model.parameters(), *model.buffers()]
    second: PreTrainedModel = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors}).eval()
    return second

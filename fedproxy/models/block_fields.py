"""What families define per block in their configurations, and how it follows a cut.

Each field is here for its meaning, by name, and never for its length: a list that happens to be as long as the model
is deep (end tokens, rope parameters) is left as it is.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fedproxy.errors import ModelError

LISTS = frozenset(
    {
        *(
            "layer_types",
            "layers_block_type",
            "mlp_layer_types",
            "indexer_types",
            "attn_layers",
            "hybrid_layer_pattern",
        ),
        *("no_rope_layers", "layer_rope_theta", "activation_sparsity_pattern", "moe_layer_freq"),
        *("num_attention_heads_per_layer", "num_key_value_heads_per_layer", "intermediate_size", "sliding_window"),
        *("moe_topk", "num_experts", "num_shared_expert", "moe_intermediate_size", "swiglu_limits"),
        *("swiglu_limits_shared",),
    }
)
"""Fields that hold one entry per block wherever they hold a list."""
INDICES = {
    **dict.fromkeys(("moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"), 0),
    **dict.fromkeys(("cross_attention_layers", "local_layer_ids"), 0),
    "ple_layer_ids": 1,
}
"""Fields that list blocks by their number, with the number of the first block."""
NESTED_INDICES = {"linear_attn_config": {"full_attn_layers": 1, "kda_layers": 1}}
"""The same inside of a field that is a mapping."""
LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers")
"""Fields that count the blocks at the start of the model that are of another kind."""
TRAILING = ("num_kv_shared_layers",)
"""The same at its end."""
DEPTHS = {"longcat_flash": ("num_layers",), "xlstm": ("num_hidden_layers", "num_blocks")}
"""Model type -> the fields that hold the number of blocks, where it is not ``num_hidden_layers`` alone."""
SLICED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""End of the names of weights outside of the blocks that hold a slice per block -> the dimension of the slices."""

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class _Pattern:
    """Fields that mark blocks by a rule over their numbers."""

    names: tuple[str, ...]
    marks: Callable[[Sequence[int], int], bool]
    """Called with the fields' values and a block's number."""
    choices: Callable[[int], Iterable[tuple[int, ...]]]
    """Called with a depth; the values to try, in this order, after those that are there."""
    unless: str = ""
    """A list that says the same block by block and goes before the rule, in families that have it."""


def _periods(depth: int) -> Iterable[tuple[int, ...]]:
    return ((period, offset) for period in range(1, depth + 2) for offset in range(period))


_PATTERNS = (
    *(
        _Pattern(
            (f"{kind}_layer_period", f"{kind}_layer_offset"),
            lambda values, block: block % values[0] == values[1],
            _periods,
            unless="layers_block_type",
        )
        for kind in ("attn", "expert")
    ),
    _Pattern(
        ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
        lambda values, block: (block + 1) % values[0] == 0 and values[1] <= block <= values[2],
        lambda depth: product(range(1, depth + 1), range(depth + 1), range(depth - 1, -1, -1)),
    ),
)


def depth_of(text: Any) -> int | None:
    """Return the number of blocks that a text configuration asks for; None where it names none."""
    depth: int | None = getattr(text, DEPTHS.get(text.model_type, ("num_hidden_layers",))[0], None)
    return depth


def cut_fields(text: Any, kept: Sequence[int], depth: int) -> None:
    """Change a text configuration of ``depth`` blocks into one of the blocks ``kept``, in place.

    Lists of one entry per block keep the entries of ``kept``, lists of block numbers and rules over them are numbered
    anew, overrides of single blocks move with them. All other fields stay.

    Raises:
        ModelError: If a rule over block numbers cannot say which kept blocks are of which kind.
    """
    if tuple(kept) == tuple(range(depth)):
        return
    overrides = text.to_dict()["per_layer_config"] if text.is_heterogeneous else None
    text.per_layer_config = None  # set again when the new depth is
    fields = dict(vars(text))
    changes: dict[str, Any] = {}
    for rule in (_lists, _indices, _counts, _patterns, _sparse_steps, _cycles, _residual_scale):
        changes |= rule(fields, kept, depth)
    for name in DEPTHS.get(text.model_type, ("num_hidden_layers",)):
        changes[name] = len(kept)
    for name, value in changes.items():
        setattr(text, name, value)
    if overrides is not None:
        by_block = {int(block): override for block, override in overrides.items()}
        text.per_layer_config = {new: by_block[old] for new, old in enumerate(kept) if old in by_block}


def rhythm(text: Any) -> int:
    """Return after how many blocks the kinds of blocks repeat where a rule over numbers says which is which, or 1."""
    fields = vars(text)
    found = [fields[pattern.names[0]] for pattern in _PATTERNS if pattern.names[0] in fields]
    return math.lcm(*found) if all(value >= 1 for value in found) else 1


def cut_slices(name: str, weight: Tensor, kept: Sequence[int], depth: int) -> Tensor:
    """Return a weight that lies outside of the blocks, with the slices of the blocks ``kept`` where it has some."""
    axis = next((axis for end, axis in SLICED.items() if name.endswith(end)), None)
    if axis is None or tuple(kept) == tuple(range(depth)):
        return weight
    width = weight.shape[axis] // depth
    places = torch.cat([torch.arange(old * width, (old + 1) * width, device=weight.device) for old in kept])
    return weight.index_select(axis, places)


def _lists(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    found = {name: fields[name] for name in LISTS & fields.keys() if isinstance(fields[name], list | tuple)}
    return {name: [value[old] for old in kept] for name, value in found.items() if len(value) >= depth}


def _indices(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    found: dict[str, Any] = {
        name: _renumbered(fields[name], kept, first) for name, first in INDICES.items() if fields.get(name)
    }
    for name, inner in NESTED_INDICES.items():
        value = fields.get(name)
        if isinstance(value, dict):
            found[name] = value | {key: _renumbered(value[key], kept, inner[key]) for key in inner if value.get(key)}
    return found


def _renumbered(blocks: Sequence[int], kept: Sequence[int], first: int) -> list[int]:
    listed = set(blocks)
    return [new + first for new, old in enumerate(kept) if old + first in listed]


def _counts(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    leading = {name: fields[name] for name in LEADING if isinstance(fields.get(name), int) and fields[name] < depth}
    trailing = {name: depth - fields[name] for name in TRAILING if fields.get(name)}
    counts = {name: sum(old < end for old in kept) for name, end in leading.items()}
    return counts | {name: sum(old >= start for old in kept) for name, start in trailing.items()}


def _patterns(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    found: dict[str, int] = {}
    for pattern in _PATTERNS:
        if any(name not in fields for name in pattern.names) or pattern.unless in fields:
            continue
        values = tuple(fields[name] for name in pattern.names)
        wanted = [pattern.marks(values, old) for old in kept]
        for choice in (values, *pattern.choices(len(kept))):
            if all(pattern.marks(choice, new) == mark for new, mark in enumerate(wanted)):
                found |= dict(zip(pattern.names, choice, strict=True))
                break
        else:
            raise ModelError(
                f"compression: no values of {' and '.join(pattern.names)} give the kept blocks {list(kept)} their "
                "kinds; keep other blocks (compression.keep) or choose compression.name=none"
            )
    return found


def _sparse_steps(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    """Every n-th block is a mixture of experts but those listed (Qwen's): all are but those listed afterwards."""
    if "mlp_only_layers" not in fields:
        return {}
    step, listed = fields.get("decoder_sparse_step", 1), set(fields["mlp_only_layers"] or ())
    dense = [new for new, old in enumerate(kept) if old in listed or (old + 1) % step]
    return {"mlp_only_layers": dense} | ({"decoder_sparse_step": 1} if "decoder_sparse_step" in fields else {})


def _cycles(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    """Kinds that are repeated: GPT-Neo's pairs of kinds and a count, RecurrentGemma's cycle."""
    if "attention_types" in fields:
        each = [kind for kinds, count in fields["attention_types"] for kind in kinds * count]
        chosen = [each[old] for old in kept]
        return {"attention_types": [[chosen, 1]], "attention_layers": chosen}
    cycle = fields.get("block_types")
    return {"block_types": [cycle[old % len(cycle)] for old in kept]} if cycle else {}


def _residual_scale(fields: Fields, kept: Sequence[int], depth: int) -> Fields:
    """MiniCPM3 divides what a block adds by the root of the depth."""
    scale = fields.get("scale_depth")
    return {"scale_depth": scale * math.sqrt(len(kept) / depth)} if scale else {}

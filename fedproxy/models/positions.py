"""How many tokens a model can read at once, from its configuration alone."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length")
_PADDED = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
"""Families whose first positions, up to that of padding, no token ever has."""


def positions(config: Any) -> int | None:
    """Return the longest sequence that a model has positions for, or None where nothing bounds it.

    Learned positions and rotary ones count alike; where rotary positions are stretched, so is the bound. A sliding
    window is not a bound: what lies behind it was read by earlier layers.

    Args:
        config: A model's configuration.
    """
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in _NAMES)
    most = next((value for value in found if isinstance(value, int) and value > 0), None)
    if most is None:
        return None
    if getattr(config, "model_type", None) in _PADDED:
        most -= int(getattr(config, "pad_token_id", None) or 0) + 1
    return max([most, *_stretched(config, most)])


def _stretched(config: Any, most: int) -> Iterator[int]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        factor, before = part.get("factor"), part.get("original_max_position_embeddings", most)
        if isinstance(factor, int | float) and isinstance(before, int) and math.isfinite(before * factor):
            yield int(before * factor)

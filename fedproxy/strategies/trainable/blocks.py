"""Which blocks of the proxy are trained: an option that several trainables share."""

from dataclasses import dataclass, replace
from typing import Any, Self

from fedproxy.errors import ConfigError
from fedproxy.models import LayerMap
from fedproxy.strategies.trainable.base import Trainable


@dataclass(frozen=True)
class BlockwiseTrainable(Trainable):
    """Base of trainables that are told which blocks to train."""

    blocks: Any = "all"
    """``all``, ``ends`` (the ``first`` and ``last`` ones), ``last``, ``centres`` (of shared blocks, the one that fusion
    plugs back), or a list of block indices of the proxy."""
    first: int = 2
    """Leading blocks of ``blocks: ends``."""
    last: int = 2
    """Trailing blocks of ``blocks: ends`` and ``blocks: last``."""

    def __post_init__(self) -> None:
        """Check the options; a list of blocks becomes a sorted tuple without repeats."""
        self.require("first", self.first >= 0, ">= 0")
        self.require("last", self.last >= 1, ">= 1")
        rule = "all, ends, last, centres or a list of block indices"
        if isinstance(self.blocks, str):
            self.require("blocks", self.blocks in {"all", "ends", "last", "centres"}, rule)
            return
        indices = tuple(sorted(set(self.blocks))) if isinstance(self.blocks, list | tuple) else ()
        self.require("blocks", bool(indices) and all(type(index) is int and index >= 0 for index in indices), rule)
        object.__setattr__(self, "blocks", indices)

    def placed(self, layer_map: LayerMap) -> Self:
        """Return the same options with ``centres`` spelt out as the block indices of this map."""
        return replace(self, blocks=layer_map.centres) if self.blocks == "centres" else self

    def block_indices(self, total: int) -> list[int]:
        """Return the chosen blocks of a proxy of ``total`` blocks, ascending.

        Raises:
            ConfigError: If a listed block does not exist.
        """
        if self.blocks == "all":
            return list(range(total))
        if self.blocks == "ends":
            return sorted({*range(min(self.first, total)), *range(max(0, total - self.last), total)})
        if self.blocks == "last":
            return list(range(max(0, total - self.last), total))
        if self.blocks == "centres":
            raise ConfigError("trainable.blocks=centres needs the server's layer map; run the recipe with fedproxy.fit")
        beyond = [index for index in self.blocks if index >= total]
        if beyond:
            raise ConfigError(f"trainable.blocks names block {beyond[0]}, but the proxy has blocks 0 to {total - 1}")
        return list(self.blocks)

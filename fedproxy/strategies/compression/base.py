"""The family of compressors."""

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.models.decoder import OTHER_PARTS
from fedproxy.models.modes import evaluating
from fedproxy.models.needs import check_needs
from fedproxy.models.probing import check_decoder, check_subset, check_target
from fedproxy.registry import Component

_log = logging.getLogger(__name__)

Batch = Tensor | Mapping[str, Tensor]
"""Token ids (batch, tokens), or a mapping of ``input_ids`` and ``attention_mask`` of that shape."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Public text that compression and distillation may read; never a client's rows."""

    path: str = "asset:calibration"
    """Asset, local file or hub id with a ``text`` column."""
    rows: int = 64
    """Rows used, the first after a seeded shuffle."""
    max_tokens: int = 512
    """Longest text, in tokens; the rest of a longer one is cut off."""

    def __post_init__(self) -> None:
        """Check the ranges; one text has two tokens at least. Else a ConfigError."""
        if self.rows < 1:
            raise ConfigError(f"compression.calibration.rows must be at least 1, got {self.rows}")
        if self.max_tokens < 2:
            raise ConfigError(f"compression.calibration.max_tokens must be at least 2, got {self.max_tokens}")


def require_removal(removed: int, ratio: float, smallest: float, unit: str) -> None:
    """Refuse a ratio that removes nothing: clients would get the whole target.

    Args:
        removed: How many go.
        ratio: What was asked for; 0 asks for nothing to go.
        smallest: The smallest ratio that removes one.
        unit: What goes.

    Raises:
        ConfigError: If a ratio above 0 removes none.
    """
    if ratio <= 0 or removed:
        return
    least = math.ceil(smallest * 10_000) / 10_000
    way = f"give at least {least:g}, or" if least < 1 else "one has to stay;"
    raise ConfigError(f"compression.ratio={ratio:g} removes no {unit}; {way} choose compression.name=none to keep all")


@dataclass(frozen=True)
class Compressor(Component, family="compression"):
    """Makes a proxy out of the target: same embedding, norm and head, fewer blocks or narrower ones.

    A subclass says which blocks the proxy is made of (:meth:`select`), from scores of its own (:meth:`score`) where it
    needs any; one that changes blocks themselves overrides :meth:`build`.
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    @property
    def leaves_gaps(self) -> bool:
        """Whether whole blocks are gone from the proxy, none of the others repeated: what healing closes."""
        return True

    def outline(self, decoder: Decoder) -> Any:
        """Return the proxy's configuration, as far as it is known without scores; weights are not read.

        Raises:
            ConfigError: If the options do not fit the target.
            ModelError: If the target cannot be compressed in this way.
        """
        return decoder.subset_config(self.places(decoder))

    def places(self, decoder: Decoder) -> Sequence[int]:
        """Return a layer map's blocks of the same number and sharing as the proxy's, known without scores."""
        return range(len(decoder))

    def score(self, decoder: Decoder, calibration: Iterable[Batch]) -> Tensor | None:
        """Return what the selection needs to know of the target, float64 on the CPU, or None where it needs nothing."""
        return None

    def block_scores(self, depth: int, scores: Tensor | None) -> Tensor | None:
        """Return the Block Influence per block, float64 (blocks,), where the scores hold it; for reports."""
        return None

    @abstractmethod
    def select(self, decoder: Decoder, scores: Tensor | None) -> Sequence[int]:
        """Return the target's block behind each block of the proxy; a repeated index shares a block."""

    def build(self, target: PreTrainedModel, scores: Tensor | None) -> tuple[PreTrainedModel, LayerMap]:
        """Return the proxy, with weights of its own, and the layer map; the target stays as it is.

        Raises:
            ConfigError: If the options do not fit the target.
            ModelError: If the target cannot be compressed in this way.
        """
        decoder, tried, first = Decoder.of(target), set[tuple[int, ...]](), None
        for kept in self.choices(decoder, scores):
            if kept in tried:
                continue
            tried.add(kept)
            try:
                proxy = self._proxy(decoder, kept)
            except ModelError as error:
                first = first or error
                continue
            if first is not None:
                _log.warning("compression: blocks %s are kept instead, since %s", list(kept), first)
            return proxy, LayerMap(kept, state_sha256(target))
        assert first is not None
        raise first

    def choices(self, decoder: Decoder, scores: Tensor | None) -> Iterator[tuple[int, ...]]:
        """Yield what to make the proxy of: the selection, and then what to try where no proxy can be made of it."""
        yield tuple(self.select(decoder, scores))

    def _proxy(self, decoder: Decoder, kept: tuple[int, ...]) -> PreTrainedModel:
        """Return the checked model of the blocks ``kept``."""
        check_needs(decoder, kept)
        proxy = decoder.subset(kept)
        check_subset(decoder, proxy, kept)
        check_decoder(proxy, remedy=OTHER_PARTS)
        return proxy

    def compress(self, target: PreTrainedModel, calibration: Iterable[Batch] = ()) -> tuple[PreTrainedModel, LayerMap]:
        """Check, score and build in one call.

        Args:
            target: The server's LLM; it stays as it is, and is looked at in evaluation mode.
            calibration: Batches of public text; not read where no score is needed.

        Raises:
            ConfigError: If the options do not fit the target.
            ModelError: If the target is no causal decoder-only model with one stack of blocks.
            DataError: If scores are needed and the calibration text holds no token.
        """
        with evaluating(target):
            check_target(target)
            return self.build(target, self.score(Decoder.of(target), calibration))

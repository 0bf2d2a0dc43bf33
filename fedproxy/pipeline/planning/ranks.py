"""Ranks of clients by what their hardware allows: from the memory that each has, and from shapes alone."""

from collections.abc import Iterator
from dataclasses import replace

from fedproxy.config import RunConfig
from fedproxy.errors import ConfigError
from fedproxy.pipeline.planning.hardware import Hardware
from fedproxy.pipeline.planning.memory import CLIENT_PROCESS, needs
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.pipeline.planning.speed import RowLength
from fedproxy.pipeline.planning.traffic import Traffic
from fedproxy.reporting.formatting import size
from fedproxy.strategies.round_parts.ranks import Ranks
from fedproxy.strategies.trainable.lora import Lora


def with_ranks_that_fit(config: RunConfig) -> RunConfig:
    """Give every client of ``parts.ranks.memory_gib`` the highest rank that its memory has room for.

    Ranks tried are ``trainable.r`` and its halves, down to 1. What training needs is what ``recipes plan`` says, with
    the longest rows that the recipe allows.

    Returns:
        The recipe with these ranks in ``parts.ranks.clients``.

    Raises:
        ConfigError: If a client has too little memory for rank 1.
    """
    part, trained = config.parts.get("ranks"), config.trainable
    if not isinstance(part, Ranks) or not part.memory_gib or not isinstance(trained, Lora):
        return config
    found: dict[str, int] = {}
    waiting = {client: gib * 2**30 for client, gib in part.memory_gib.items()}
    least = 0
    for rank in _halves(trained.r):
        least = training_bytes(config, rank)
        found |= {client: rank for client, memory in waiting.items() if memory >= least}
        waiting = {client: memory for client, memory in waiting.items() if memory < least}
        if not waiting:
            break
    for client in sorted(waiting):
        raise ConfigError(
            f"parts.ranks.memory_gib.{client}: training needs {size(least)} even at rank 1, got "
            f"{size(waiting[client])}; lower client.batch_size, use client.gradient_checkpointing=true or leave the "
            "client out"
        )
    return replace(config, parts={**config.parts, "ranks": part.with_ranks(found)})


def training_bytes(config: RunConfig, rank: int) -> int:
    """Return the bytes that a client's process holds while it trains LoRA of a rank, its libraries included."""
    assert isinstance(config.trainable, Lora)
    others = {name: part for name, part in config.parts.items() if name != "ranks"}
    outline = Outline.of(replace(config, trainable=replace(config.trainable, r=rank), parts=others))
    roles = needs(outline, Traffic.of(outline), RowLength.of(Hardware(), outline))
    return CLIENT_PROCESS + max(need.total for need in roles if need.role == "client")


def _halves(rank: int) -> Iterator[int]:
    while rank:
        yield rank
        rank //= 2

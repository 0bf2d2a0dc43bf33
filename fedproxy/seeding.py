"""Every random draw comes from a generator seeded by what it is for: (seed, round, client, purpose)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that depends on ``seed`` and every part of ``purpose``, the same on every machine."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@dataclass(frozen=True)
class ClientSeeds:
    """The seeds of one client's own draws in one round: hashes, from which no other draw of the run can be foreseen."""

    batches: int
    """Of the order of its rows."""
    dropout: Sequence[int]
    """Of its dropout masks, one for each process that trains it."""
    parts: int = 0
    """Of what round parts draw: each derives its own from it."""

    @classmethod
    def of(cls, seed: int, round_: int, client_id: str, processes: int = 1) -> "ClientSeeds":
        """Derive them from the run's seed, which stays with the server.

        Args:
            seed: Seed of the run.
            round_: Round number.
            client_id: The client.
            processes: How many processes train it; they share its batches, and each draws its own masks.
        """
        ranks: list[tuple[int, ...]] = [(rank,) if rank else () for rank in range(processes)]
        dropout = [derive_seed(seed, round_, client_id, "dropout", *rank) for rank in ranks]
        return cls(
            derive_seed(seed, round_, client_id, "batches"), dropout, derive_seed(seed, round_, client_id, "parts")
        )

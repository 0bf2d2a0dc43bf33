"""Round parts: what rides with a round beside the state; rules name those that they need."""

from fedproxy.registry import import_members
from fedproxy.strategies.round_parts.base import (
    ClientRound,
    Forms,
    Group,
    RoundPart,
    RoundResult,
    Rules,
    chain,
    described,
    made,
    parts_of,
)

__all__ = [
    "ClientRound",
    "Forms",
    "Group",
    "RoundPart",
    "RoundResult",
    "Rules",
    "chain",
    "described",
    "made",
    "parts_of",
]

import_members(__name__, __path__)

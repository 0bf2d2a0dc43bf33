"""Aggregators: rules that merge the clients' updates of a round; pick one by name."""

from fedproxy.registry import import_members
from fedproxy.strategies.aggregators.base import Aggregation, Aggregator, Memory, RoundContext

__all__ = ["Aggregation", "Aggregator", "Memory", "RoundContext"]

import_members(__name__, __path__)

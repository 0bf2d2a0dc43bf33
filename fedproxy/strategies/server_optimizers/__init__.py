"""Server optimizers: how the merged update changes the shared state; pick one by name."""

from fedproxy.registry import import_members
from fedproxy.strategies.server_optimizers.base import ServerOptimizer

__all__ = ["ServerOptimizer"]

import_members(__name__, __path__)

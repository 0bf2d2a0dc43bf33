"""Regularizers: terms that clients add to their task loss; pick one by name."""

from fedproxy.registry import import_members
from fedproxy.strategies.regularizers.base import Regularizer

__all__ = ["Regularizer"]

import_members(__name__, __path__)

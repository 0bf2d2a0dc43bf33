"""Fusion operators: how what the proxy learned is plugged back into the target (stage iii)."""

from fedproxy.registry import import_members
from fedproxy.strategies.fusion.base import Fusion

import_members(__name__, __path__)

__all__ = ["Fusion"]

"""What the server does to the proxy's frozen blocks before every broadcast."""

from fedproxy.registry import import_members
from fedproxy.strategies.realignment.base import Material, Realignment

import_members(__name__, __path__)

__all__ = ["Material", "Realignment"]

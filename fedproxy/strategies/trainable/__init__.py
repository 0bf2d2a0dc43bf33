"""What clients train inside the proxy."""

from fedproxy.registry import import_members
from fedproxy.strategies.trainable.base import Trainable, TrainableModel

import_members(__name__, __path__)

__all__ = ["Trainable", "TrainableModel"]

"""Compressors: how the target becomes a proxy (stage i)."""

from fedproxy.models.layer_map import LayerMap
from fedproxy.registry import import_members
from fedproxy.strategies.compression.base import CalibrationConfig, Compressor
from fedproxy.strategies.compression.healing import HealingConfig

import_members(__name__, __path__)

__all__ = ["CalibrationConfig", "Compressor", "HealingConfig", "LayerMap"]

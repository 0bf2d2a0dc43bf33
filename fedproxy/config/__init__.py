"""The configuration of a run. Its classes are imported when they are first asked for: they bring torch along."""

import importlib
from typing import TYPE_CHECKING, Any

from fedproxy.config.loading import check_arguments, load_config, to_dict, to_yaml

if TYPE_CHECKING:
    from fedproxy.config.schema import (
        ClientConfig,
        DataConfig,
        EvaluationConfig,
        FederationConfig,
        RunConfig,
        TargetConfig,
    )
    from fedproxy.modules.distillation_config import DistillationConfig

__all__ = [
    "ClientConfig",
    "DataConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "FederationConfig",
    "RunConfig",
    "TargetConfig",
    "check_arguments",
    "load_config",
    "to_dict",
    "to_yaml",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fedproxy.config.schema"), name)

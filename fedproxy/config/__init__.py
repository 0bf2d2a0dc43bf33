"""The configuration of a run."""

from fedproxy.config.loading import load_config, to_dict, to_yaml
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
    "load_config",
    "to_dict",
    "to_yaml",
]

"""Round metrics to Lightning's loggers: CSV files or TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedproxy.errors import ConfigError


def round_loggers(names: Sequence[str], root: Path) -> list[Any]:
    """Return the Lightning loggers of those names, writing under ``root``.

    Raises:
        ConfigError: If a logger's package is not installed.
    """
    from lightning.pytorch import loggers

    classes = {"csv": loggers.CSVLogger, "tensorboard": loggers.TensorBoardLogger}
    made = []
    for name in names:
        try:
            made.append(classes[name](save_dir=str(root), name="logs", version=name))
        except ModuleNotFoundError as error:
            raise ConfigError(f"loggers: {name} needs a package that is not installed; pip install {name}") from error
    return made


def log_round(loggers: Sequence[Any], record: Mapping[str, Any]) -> None:
    """Write every single number of a round's record, and per-client figures under the client's name."""
    metrics: dict[str, float] = {}
    clients: Sequence[str] = record["clients"]
    for name, value in record.items():
        if isinstance(value, int | float) and name != "round":
            metrics[f"round/{name}"] = float(value)
        elif isinstance(value, list) and len(value) == len(clients) and all(isinstance(v, float) for v in value):
            metrics |= {f"{name}/{client}": v for client, v in zip(clients, value, strict=True)}
    for logger in loggers:
        logger.log_metrics(metrics, step=record["round"])
        logger.save()

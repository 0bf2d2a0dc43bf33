"""Rounds and scores to Lightning's loggers: CSV files, TensorBoard, MLflow or Weights & Biases (offline).

Each logger writes below ``logs/`` of the run folder, and ``logs/<logger>.json`` notes how far it is, so that a run that
goes on neither repeats a round nor loses one.
"""

import importlib.util
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError, ConfigError, first_line
from fedproxy.files import write_json
from fedproxy.names import file_stem
from fedproxy.sealed import read_kept

PROJECT = "fedproxy"
"""Name of the MLflow experiment and of the Weights & Biases project."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ -]*")


@dataclass
class Seen:
    """How far a logger is."""

    round: int = 0
    """Last round it was told of."""
    id: str | None = None
    """Its own name for the run; None for loggers that go by folder, and before the first round."""


def _csv(folder: Path, run: str, seen: Seen) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    shutil.rmtree(folder / "csv", ignore_errors=True)  # it never adds to a file, so it is told of every round again
    seen.round = 0
    return CSVLogger(save_dir=str(folder), name="", version="csv")


def _tensorboard(folder: Path, run: str, seen: Seen) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    options = {"purge_step": seen.round + 1} if seen.round else {}
    return TensorBoardLogger(str(folder), name="", version="tensorboard", default_hp_metric=False, **options)


def _mlflow(folder: Path, run: str, seen: Seen) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow  # noqa: F401 (it sets its logging up when it is imported)
    from lightning.pytorch.loggers import MLFlowLogger

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    logger = MLFlowLogger(PROJECT, run_name=run, tracking_uri=uri, run_id=seen.id)
    seen.id = logger.run_id
    return logger


def _wandb(folder: Path, run: str, seen: Seen) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    seen.id = seen.id or uuid.uuid4().hex[:8]
    settings = wandb.Settings(silent=True, console="off")
    return WandbLogger(run, str(folder), version=seen.id, offline=True, project=PROJECT, settings=settings)


_MAKERS: dict[str, Callable[[Path, str, Seen], Any]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise a ConfigError for a logger whose package is not installed, without importing any."""
    for name in names:
        spec = None if name == "csv" else importlib.util.find_spec(name)
        if name != "csv" and (spec is None or spec.origin is None):  # a folder of that name is no package
            raise ConfigError(f"loggers: {name} needs a package that is not installed; pip install {name}")


class RunLoggers:
    """The loggers of one run, started when there is something to log; one that fails ends the run in one line.

    Args:
        names: Which loggers.
        root: The run's folder.
        hyperparameters: The run's configuration, as plain values.
    """

    def __init__(self, names: Sequence[str], root: Path, hyperparameters: Mapping[str, Any]) -> None:
        self._names, self._run, self._folder = list(names), root.resolve().name, root / "logs"
        self._hyperparameters = dict(hyperparameters)
        self._started: dict[str, tuple[Any, Seen]] = {}

    def rounds(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell every logger of the rounds that it does not know: figures by name, per-client ones by client."""
        for name in self._names:
            with _one_line(name):
                logger, seen = self._get(name)
                for record in records:
                    if record["round"] > seen.round:
                        logger.log_metrics(round_metrics(record), step=record["round"])
                        seen.round = record["round"]
                logger.save()
                write_json(self._note(name), asdict(seen))

    def scores(self, scores: Mapping[str, Mapping[str, Mapping[str, float | None]]], step: int) -> None:
        """Tell every logger of the final scores (model to task to metric), as ``scores/<model>/<task>/<metric>``."""
        metrics = {
            f"scores/{model}/{task}/{metric}": float(value)
            for model, tasks in scores.items()
            for task, found in tasks.items()
            for metric, value in found.items()
            if value is not None
        }
        for name in self._names if metrics else ():
            with _one_line(name):
                logger, _ = self._get(name)
                if name == "tensorboard":  # shows hyperparameters only together with metrics
                    logger.log_hyperparams(self._hyperparameters, metrics, step)
                else:
                    logger.log_metrics(metrics, step=step)
                logger.save()

    def close(self, status: str) -> None:
        """End the loggers' runs with ``success`` or ``failed``."""
        started, self._started = self._started, {}
        for name, (logger, _) in started.items():
            with _one_line(name):
                logger.finalize(status)
                if name == "wandb":  # its run is one per process until it is finished
                    logger.experiment.finish(exit_code=0 if status == "success" else 1)

    def _get(self, name: str) -> tuple[Any, Seen]:
        if name not in self._started:
            self._folder.mkdir(parents=True, exist_ok=True)
            seen = Seen(**(read_kept(self._note(name), dict, remedy="delete it") or {}))
            known = name == "mlflow" and seen.id is not None  # it refuses to change a parameter
            logger = _MAKERS[name](self._folder, self._run, seen)
            if not known:
                logger.log_hyperparams(self._hyperparameters)
            self._started[name] = logger, seen
        return self._started[name]

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def round_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's single numbers as ``round/<name>``, per-client ones as ``<name>/<client>``, and validation."""
    metrics: dict[str, float] = {}
    clients: Sequence[str] = record["clients"]
    for name, value in record.items():
        if isinstance(value, int | float) and name != "round":
            metrics[f"round/{name}"] = float(value)
        elif isinstance(value, list) and len(value) == len(clients) and all(isinstance(v, float) for v in value):
            metrics |= {f"{name}/{_part(client)}": v for client, v in zip(clients, value, strict=True)}
    for source, found in (record.get("validation") or {}).items():
        metrics |= {f"validation/{_part(source)}/{name}": float(v) for name, v in found.items() if v is not None}
    return metrics


def _part(name: str) -> str:
    """Return a client's or source's name as a part of a metric's: loggers take few characters."""
    return name if _PLAIN.fullmatch(name) else file_stem(name)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"loggers: {name} needs a package that is not installed ({error})") from error
    except Exception as error:  # databases, services and files: each has errors of its own
        reason = first_line(error)
        raise CheckpointError(f"loggers: {name} failed ({reason}); go on with resume=auto, or without it") from error

"""lightning.Trainer from a recipe's options: every option reachable, quiet by default, cheap to start."""

import inspect
import logging
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedproxy.errors import ConfigError, nearest
from fedproxy.interrupts import interruption

# Trainer options that a recipe sets elsewhere, and where.
_ELSEWHERE = {
    "max_epochs": "client.epochs",
    "min_epochs": "client.epochs",
    "max_steps": "client.max_steps",
    "min_steps": "client.epochs",
    "max_time": "federation.round_timeout_s",
    "limit_train_batches": "data.rows_per_task",
    "overfit_batches": "data.rows_per_task",
    "fast_dev_run": "data.rows_per_task",
    "accumulate_grad_batches": "client.accumulate",
    "gradient_clip_val": "client.max_grad_norm",
    "default_root_dir": "output_dir",
    "use_distributed_sampler": "trainer.devices",
}
_KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}
"""Kinds of values that a recipe can write, in words."""
_QUIET: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
}
_LOGGERS: Mapping[str, type[Logger]] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "16": torch.float16}
_PLAIN_TOKENS = 256
"""Longest rows whose attention weights are kept (bfloat16, heads x tokens^2 per row and block)."""


def trainer_options() -> tuple[str, ...]:
    """Return the names that a recipe's ``trainer`` node may have: those of lightning.Trainer set nowhere else."""
    known = inspect.signature(lightning.Trainer.__init__).parameters
    return tuple(name for name in known if name != "self" and name not in _ELSEWHERE)


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Check names against lightning.Trainer's signature, without building one.

    Raises:
        ConfigError: If an option is unknown, or is set by another key of the recipe.
    """
    known = trainer_options()
    for name in options:
        if name in _ELSEWHERE:
            raise ConfigError(f"trainer.{name} is set by {_ELSEWHERE[name]}; use that instead")
        if name not in known:
            raise ConfigError(f"trainer.{name}: lightning.Trainer has no such option{nearest(name, known)}")


def _check_value(name: str, value: Any) -> None:
    """Refuse a value of a kind that an option of plain kinds does not take: Lightning takes any word for true.

    Raises:
        ConfigError: Naming the kinds.
    """
    hint = get_type_hints(lightning.Trainer.__init__)[name]
    kinds = get_args(hint) if get_origin(hint) is Union else (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    plain = [kind for kind in kinds if kind in _KINDS]
    if len(plain) < len(kinds) - sum(get_origin(kind) is Literal for kind in kinds):
        return  # it also takes objects, which Lightning checks
    if value not in words and type(value) not in plain and not (float in plain and type(value) is int):
        wanted = dict.fromkeys([*(_KINDS[kind] for kind in plain), *map(str, words)])
        raise ConfigError(f"trainer.{name} must be {' or '.join(wanted)}, got {value!r}")


def make_trainer(
    options: Mapping[str, Any],
    *,
    max_epochs: int = 1,
    max_steps: int = -1,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    callbacks: Sequence[Callback] = (),
    root: str | Path | None = None,
) -> lightning.Trainer:
    """Build a Trainer: silent defaults, then the recipe's options.

    Args:
        options: The recipe's ``trainer`` node. ``logger`` may also be ``csv`` or ``tensorboard``.
        max_epochs: Epochs of the fit.
        max_steps: Optimiser steps after which the fit ends, -1 for no limit.
        accumulate: Batches whose gradients are added up before a step.
        max_grad_norm: Largest gradient norm; longer gradients are scaled down. None for no limit.
        callbacks: Lightning callbacks, which come before the recipe's own.
        root: Folder for what a logger, a profiler or a callback writes; made when something is written.

    Raises:
        ConfigError: If an option is unknown or Lightning refuses its value.
    """
    check_trainer_options(options)
    for option, value in options.items():
        _check_value(option, value)
    arguments: dict[str, Any] = {**_QUIET, **options}
    name = arguments["logger"]
    if isinstance(name, str):
        if name not in _LOGGERS:
            raise ConfigError(f"trainer.logger: unknown logger {name!r}{nearest(name, _LOGGERS)}")
        arguments["logger"] = _build(_LOGGERS[name], save_dir=root or "logs", name="", version="")
    arguments["callbacks"] = [*callbacks, *_own_callbacks(options.get("callbacks"))]
    if "." in str(options.get("profiler")):
        arguments["profiler"] = _own("trainer.profiler", options["profiler"], Profiler)
    with quiet():
        trainer: lightning.Trainer = _build(
            lightning.Trainer,
            **arguments,
            max_epochs=max_epochs,
            max_steps=max_steps,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=max_grad_norm,
            default_root_dir=root,
            use_distributed_sampler=False,  # the processes of a client split each batch
        )
    if options.get("profiler"):
        trainer.profiler.dirpath, trainer.profiler.filename = root, "profile"
    return trainer


def _own_callbacks(names: Any) -> list[Callback]:
    """Return a new callback of each class that a recipe names."""
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"trainer.callbacks must be a list of classes like [my_plugin.MyCallback], got {names!r}")
    return [_own("trainer.callbacks", name, Callback) for name in names or ()]


def _own(key: str, name: str, kind: type[Any]) -> Any:
    """Return a new object of a class that a recipe names by its module; nothing is imported for that.

    Raises:
        ConfigError: If no module that was imported, as plugins are, has such a class.
    """
    module, _, own = name.rpartition(".")
    found = getattr(sys.modules.get(module), own, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(
            f"{key}: {name} is not a {kind.__name__} of Lightning's or of a plugin; write module.Class, and "
            f"plugins=[{module or 'my_plugin'}] on the command line"
        )
    return _build(found)


def fit(
    trainer: lightning.Trainer, module: lightning.LightningModule, batches: Iterable[Any], *, seed: int | None = None
) -> None:
    """Fit a module on batches without Lightning's notices.

    Args:
        trainer: From :func:`make_trainer`.
        module: The module to fit.
        batches: Training batches, iterated once per epoch; no list, which Lightning takes for a list of loaders.
        seed: Seeds the global generators that dropout draws from, for the length of the fit alone. None leaves them.

    Raises:
        KeyboardInterrupt: If the user interrupts. (Lightning would end the process and ignore further interrupts.)
    """
    with fitting(trainer, module, seed=seed):
        trainer.fit(module, batches)


@contextmanager
def fitting(
    trainer: lightning.Trainer, module: lightning.LightningModule, *, seed: int | None = None
) -> Iterator[None]:
    """Surround ``trainer.fit`` with what :func:`fit` promises; the call itself is then the caller's own."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    with quiet(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            yield
        except SystemExit as end:
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise (interruption(end) or KeyboardInterrupt()) from None
        finally:
            _release(trainer, module)


def autocast_dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of matrix products under a recipe's ``trainer.precision``, None where it is the weights'."""
    return _AUTOCAST.get(str(options.get("precision")))


def adamw(
    trainer: lightning.Trainer, parameters: Sequence[Tensor], *, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW with PyTorch's betas and eps, as one kernel where all parameters are on the CPU.

    Args:
        trainer: The Trainer that will step it.
        parameters: What it steps.
        lr: Learning rate, constant.
        weight_decay: Decoupled weight decay.
    """
    scales = str(trainer.precision) == "16-mixed"  # only there does a scaler have to come before clipping
    fused = all(parameter.device.type == "cpu" for parameter in parameters) and not scales
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True if fused else None)
    if fused:
        optimizer._step_supports_amp_scaling = False  # or Lightning refuses to clip under bf16-mixed too
    return optimizer


def is_slow(options: Mapping[str, Any], device: torch.device) -> bool:
    """Return whether a recipe's precision is far slower here than float32: bfloat16 on a CPU that cannot multiply it.

    Args:
        options: Options of lightning.Trainer.
        device: Where training and scoring run.
    """
    if device.type != "cpu" or autocast_dtype(options) is not torch.bfloat16:
        return False
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (known and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attention(ids: Tensor) -> AbstractContextManager[None]:
    """Return the context of a training step's forward pass, which chooses the attention kernel of both directions.

    Under autocast to bfloat16 on the CPU the flash kernel goes backward at a third to a half of the plain one's speed,
    which keeps the attention weights: it is left out where those are small.

    Args:
        ids: The batch's tokens, int64 (batch, length), padding included.
    """
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    plain = ids.device.type == "cpu" and half and ids.shape[1] <= _PLAIN_TOKENS
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    return context


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back Lightning's information messages and its advice on data loaders and loggers, errors excepted."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _release(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Free optimiser state and gradients now: the Trainer's reference cycles keep them until Python looks for such."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    module.zero_grad(set_to_none=True)


def _build(kind: Any, **arguments: Any) -> Any:
    try:
        return kind(**arguments)
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"trainer: {message}; correct the option in the recipe's trainer node") from error

"""The devices that train one client, as a recipe's ``trainer`` node says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedproxy.errors import ConfigError
from fedproxy.machine import cores

STRATEGIES = ("ddp", "fsdp")
"""How several devices can train one client."""


def keep_to_cores() -> None:
    """Let PyTorch use no more threads than a container's quota has cores, unless ``OMP_NUM_THREADS`` names a number.

    It counts the cores of the host, and threads that have lost their core make all others wait.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())


@dataclass(frozen=True)
class ClientDevices:
    """One process for each device that trains a client."""

    count: int
    """Devices of one client."""
    indices: tuple[int, ...] = ()
    """Which accelerators, where the recipe lists them."""
    strategy: str | None = None
    """One of :data:`STRATEGIES`; None with one device."""

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> "ClientDevices":
        """Read them from Trainer options, in which ``devices: auto`` is one device whatever the machine has.

        Raises:
            ConfigError: If devices, strategy and machine do not go together.
        """
        indices = _indices(trainer.get("devices", "auto"))
        count = indices if isinstance(indices, int) else len(indices)
        strategy, nodes = trainer.get("strategy", "auto"), trainer.get("num_nodes", 1)
        if nodes != 1 or isinstance(nodes, bool):  # Lightning would wait for the others
            raise ConfigError(f"trainer.num_nodes must be 1, got {nodes!r}; a client stays on one node")
        if count == 1:
            _check_one(strategy)
            return cls(1, () if isinstance(indices, int) else indices)
        strategy = "ddp" if strategy == "auto" else strategy
        _check_several(count, strategy, trainer)
        return cls(count, () if isinstance(indices, int) else indices, strategy)

    def describe(self, batch_size: int) -> str:
        """Return in words what one step of a client is on these devices."""
        small, more = divmod(batch_size, self.count)
        each = f"{small}" if not more else f"{small} or {small + 1}"
        return (
            f"each client trains on {self.count} devices ({self.strategy}): {batch_size} rows a batch, {each} on each"
        )


def one_device(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return Trainer options for one device of this process, whatever a client has."""
    devices = ClientDevices.of(trainer)
    options = {**trainer, "devices": list(devices.indices[:1]) or 1}
    if devices.count > 1:
        options.pop("strategy", None)
    return options


def accelerators(trainer: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the accelerators of this node that clients may use; none where they stay on the CPU."""
    if trainer.get("accelerator") == "cpu" or not torch.accelerator.is_available():
        return ()
    devices = trainer.get("devices", "auto")
    return tuple(devices) if isinstance(devices, list) else tuple(range(torch.accelerator.device_count()))


def training_device(trainer: Mapping[str, Any]) -> torch.device:
    """Return the device of Trainer options for one device."""
    there = accelerators(trainer)
    found = torch.accelerator.current_accelerator(check_available=True) if there else None
    return torch.device("cpu") if found is None else torch.device(found.type, there[0])


def _indices(devices: Any) -> int | tuple[int, ...]:
    """Return a number of devices, or those that are listed."""
    if devices == "auto":
        return 1
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if type(devices) is int and devices >= 1:
        return devices
    if isinstance(devices, list) and devices and all(type(index) is int and index >= 0 for index in devices):
        return tuple(devices)
    raise ConfigError(
        f"trainer.devices must be auto (one per client), a number of devices per client or a list of accelerators, "
        f"got {devices!r}"
    )


def _check_one(strategy: Any) -> None:
    """Refuse strategies with one device: Lightning's others start processes of their own, or wait for some."""
    if strategy in STRATEGIES:
        raise ConfigError(
            f"trainer.strategy={strategy} spreads a client over several devices; set trainer.devices=2 or more"
        )
    if strategy != "auto":
        raise ConfigError(f"trainer.strategy must be auto with one device per client, got {strategy!r}; leave it out")


def _check_several(count: int, strategy: Any, trainer: Mapping[str, Any]) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"trainer.strategy must be {' or '.join(STRATEGIES)} with trainer.devices={trainer['devices']}, "
            f"got {strategy!r}"
        )
    there = accelerators({**trainer, "devices": "auto"})
    wanted = trainer["devices"] if isinstance(trainer["devices"], list) else list(range(count))
    missing = sorted(set(wanted) - set(there))
    if there and missing:
        raise ConfigError(
            f"trainer.devices={trainer['devices']}: this machine has {len(there)} accelerators; "
            "use as many at most, or trainer.accelerator=cpu"
        )
    if strategy == "fsdp" and str(trainer.get("precision", "")) in ("16-mixed", "16"):
        raise ConfigError(
            "trainer.precision=16-mixed scales losses on each device apart, which trainer.strategy=fsdp cannot have; "
            "use bf16-mixed"
        )

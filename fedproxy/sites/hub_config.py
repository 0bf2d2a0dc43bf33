"""What the server's owner writes into ``hub.yaml``."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedproxy.errors import ConfigError
from fedproxy.sites.arguments import read_file
from fedproxy.wire.flower import SITES, Flower

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,252})")


@dataclass(frozen=True)
class HubConfig:
    """The server's side of a federation: what sites connect to."""

    hosts: list[str]
    """Names or addresses that sites reach this machine by; the certificate holds them."""
    port: int = 8443
    """Port of the front door, the only one that is reached from outside."""
    listen: str = "0.0.0.0"
    """Address that the front door listens on."""
    folder: str = "hub"
    """Folder for what the hub keeps: keys, registrations, Flower's files, logs. Runs name it as engine.hub."""
    superlink_port: int = 9093
    """Port on this machine alone that Flower's SuperLink listens on."""
    front_door: Literal["nginx", "external"] = "nginx"
    """``nginx`` is started and watched; ``external`` is yours to run, with the files that init writes as a pattern."""
    nginx: str = ""
    """Path of nginx; empty looks for it."""
    flower: str = ""
    """Folder of Flower's commands, where they are installed apart; empty takes those beside this Python."""

    def __post_init__(self) -> None:
        """Check names and ports.

        Raises:
            ConfigError: Naming the first that cannot be.
        """
        if not self.hosts or not all(_HOST.fullmatch(host) for host in self.hosts):
            raise ConfigError(f"hosts must be names or addresses like [hub.example], got {self.hosts}")
        if not _HOST.fullmatch(self.listen):
            raise ConfigError(f"listen must be an address of this machine like 0.0.0.0, got {self.listen!r}")
        for key in ("port", "superlink_port"):
            if not 1 <= getattr(self, key) <= 65535:
                raise ConfigError(f"{key} must be from 1 to 65535, got {getattr(self, key)}")
        if self.port == self.superlink_port:
            raise ConfigError(f"superlink_port must differ from port, got {self.port} for both")


@dataclass(frozen=True)
class HubPlace:
    """A hub's configuration with the folder that its paths begin in."""

    config: HubConfig
    base: Path

    @classmethod
    def read(cls, path: Path) -> "HubPlace":
        """Read a hub's file.

        Raises:
            ConfigError: Naming file, key and rule.
        """
        return cls(read_file(path, HubConfig, "hub file"), path.absolute().parent)

    @property
    def folder(self) -> Path:
        """Where the hub keeps what it keeps."""
        return self.base / self.config.folder

    @property
    def keys(self) -> Path:
        """Folder of its keys and certificates."""
        return self.folder / "keys"

    @property
    def registered(self) -> Path:
        """Folder of the sites' public keys, by name."""
        return self.folder / SITES

    @property
    def flower(self) -> Flower:
        """Flower's commands."""
        return Flower(self.folder / "flower", self.config.flower)

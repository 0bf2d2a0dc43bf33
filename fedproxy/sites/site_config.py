"""What a data owner writes into ``site.yaml``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from fedproxy.config.loading import build
from fedproxy.data.formats import DataFormat
from fedproxy.data.rows import Row
from fedproxy.errors import ConfigError
from fedproxy.machine import MOST_THREADS
from fedproxy.names import check_name, check_names
from fedproxy.sites.arguments import read_file
from fedproxy.sites.policy import Policy


@dataclass(frozen=True)
class ClientData:
    """One client's rows: lm-eval tasks, files with a prompt and a target column, or both."""

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks whose train split are its rows."""
    files: dict[str, str] = field(default_factory=dict)
    """Files, name to path, in the client's own formats."""
    format: DataFormat = field(default_factory=lambda: DataFormat.by_name("prompt_target")())
    """Format of the files; see data.format of recipes."""
    formats: dict[str, str] = field(default_factory=dict)
    """Formats of single files, name to a format's name."""
    weights: dict[str, float] = field(default_factory=dict)
    """How many times the rows of single tasks or files stand in an epoch, 1 by default."""
    holdout: int | float | None = None
    """Rows that are not trained on, to score models on here: a share of each source's rows, or a number of them."""
    prompt_column: str = "prompt"
    """Column of files that the model is given."""
    target_column: str = "target"
    """Column of files that it should answer."""
    rows_per_task: int | None = None
    """Rows sampled per task or file; null takes all."""
    end_token: Literal["auto", "always", "never"] = "auto"
    """Whether targets end with the tokenizer's end-of-sequence token; see data.end_token of recipes."""
    seed: int = 42
    """Seed of these draws."""

    def rows(self, folder: Path) -> list[Row]:
        """Read the rows.

        Args:
            folder: Where paths of files begin.

        Raises:
            ConfigError, DataError, AssetError: If they cannot be used.
        """
        from fedproxy.config.schema import DataConfig  # heavy, and a site's file is read without rows too
        from fedproxy.pipeline.data import client_rows

        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("files", "seed")}
        files = {name: path if ":" in path else str(folder / path) for name, path in self.files.items()}
        config = DataConfig(files=files, **own)
        return [row for own in client_rows(config, seed=self.seed).values() for row in own]


@dataclass(frozen=True)
class ServerPlace:
    """Where the hub is, and how it and the site know each other."""

    address: str = "localhost:8443"
    """Host and port of the hub's front door."""
    ca: str = "keys/ca.crt"
    """Certificate that the hub's is signed with; the hub's owner gives it to you."""
    key: str = "keys/site"
    """The site's own private key, which never leaves it; its .pub goes to the hub's owner."""


@dataclass(frozen=True)
class SiteConfig:
    """A data owner's side of a federation."""

    name: str
    """Name that the hub registers the site by."""
    clients: dict[str, Any]
    """Clients by name: often one, with the site's own name. What each takes: tasks, files, columns."""
    folder: str = "site"
    """Folder for what the site keeps: its rows as they are trained on, proxies, memories, logs."""
    server: ServerPlace = field(default_factory=ServerPlace)
    """The hub."""
    policy: Policy = field(default_factory=Policy)
    """What may be done with the rows."""
    peers: dict[str, str] = field(default_factory=dict)
    """Signing keys of other sites' clients, for privacy.secure_aggregation: name to the 64 digits that their site's
    check shows. Compare them by telephone."""
    workers: int | str = "auto"
    """Processes that train clients side by side; see engine.workers."""
    threads: int = 1
    """CPU threads inside their operations."""
    trainer: dict[str, Any] = field(
        default_factory=lambda: {"accelerator": "auto", "devices": "auto", "precision": "32-true"}
    )
    """Options of lightning.Trainer at this site."""
    keep_runs: int = 3
    """Runs whose memories stay; older ones are deleted."""
    node_port: int = 9094
    """Port on this machine alone that Flower's SuperNode and its relay speak through."""
    flower: str = ""
    """Folder of Flower's commands, where they are installed apart; empty takes those beside this Python."""
    relay_user: str = ""
    """User that Flower's processes run as, so that they cannot read the rows; empty is who starts the site."""

    def __post_init__(self) -> None:
        """Check names and numbers.

        Raises:
            ConfigError: Naming the first that cannot be.
        """
        check_name(self.name, "name")
        check_names(self.clients, "clients")
        if not self.clients:
            raise ConfigError("clients must name at least one client with its rows")
        if self.workers != "auto" and (not isinstance(self.workers, int) or self.workers < 1):
            raise ConfigError(f"workers must be 'auto' or at least 1, got {self.workers!r}")
        if self.keep_runs < 1:
            raise ConfigError(f"keep_runs must be at least 1, got {self.keep_runs}")
        if not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"threads must be from 1 to {MOST_THREADS}, got {self.threads}")
        if not 1 <= self.node_port <= 65535:
            raise ConfigError(f"node_port must be from 1 to 65535, got {self.node_port}")
        check_names(self.peers, "peers")
        for peer, key in self.peers.items():
            if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
                raise ConfigError(f"peers.{peer} must be the 64 digits that its site's check shows")
        for client, options in self.clients.items():
            data = build(ClientData, options, f"clients.{client}")
            if not data.tasks and not data.files:
                raise ConfigError(f"clients.{client} must have tasks or files; give it rows")

    def data(self, client: str) -> ClientData:
        """Return where one client's rows come from."""
        data: ClientData = build(ClientData, self.clients[client], f"clients.{client}")
        return data


@dataclass(frozen=True)
class SitePlace:
    """A site's configuration with the folder that its paths begin in."""

    config: SiteConfig
    base: Path

    @classmethod
    def read(cls, path: Path) -> "SitePlace":
        """Read a site's file.

        Raises:
            ConfigError: Naming file, key and rule.
        """
        return cls(read_file(path, SiteConfig, "site file"), path.absolute().parent)

    @property
    def folder(self) -> Path:
        """Where the site keeps what it keeps."""
        return self.base / self.config.folder

    def path(self, text: str) -> Path:
        """Return where a path of the file leads."""
        return self.base / text

    def rows(self) -> Mapping[str, list[Row]]:
        """Read all clients' rows.

        Raises:
            ConfigError, DataError, AssetError: If a client's cannot be used; the message names it.
        """
        return {client: self.config.data(client).rows(self.base) for client in sorted(self.config.clients)}

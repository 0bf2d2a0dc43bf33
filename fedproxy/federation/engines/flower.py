"""Clients at real sites, each with rows that the server never sees; Flower carries the messages."""

import re
import secrets
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import CheckpointError, ClientError, ConfigError, nearest
from fedproxy.federation.client.base import Client, RemoteClient
from fedproxy.federation.engines.base import Engine
from fedproxy.files import read_json, write_json
from fedproxy.wire.bundle import Bundle
from fedproxy.wire.courier import CourierError
from fedproxy.wire.flower import FlowerCourier, registered
from fedproxy.wire.link import Link, Terms
from fedproxy.wire.messages import Setup
from fedproxy.wire.remote import RemoteSites


@dataclass(frozen=True)
class Flower(Engine, name="flower"):
    """Clients at real sites (``python -m fedproxy.site``), reached through a hub (``python -m fedproxy.hub``).

    The loop, its checkpoints and its checks are those of every engine; Flower is the courier alone. Devices, workers
    and trainer options are each site's own. A site that is late, refuses or goes away is dropped by name and reason.
    """

    at_sites: ClassVar[bool] = True

    hub: str = "hub"
    """Folder of the hub on this machine."""
    sites: list[str] = field(default_factory=list)
    """Sites that take part, by the names that the hub registered; empty takes all."""
    wait_s: float = 120.0
    """Seconds that a site may be away before it is dropped, and that the hub may be away before the run ends."""
    part_mb: int = 128
    """Largest part of a file in MiB; sites and hub hold a few of them in memory."""
    proxy: str = "send"
    """``send`` sends the proxy to sites that lack it, once; ``expect`` asks that they hold it."""
    attempts: int = 2
    """How often a site's message is sent where the site or its relay dies."""
    largest_mb: int = 8192
    """Largest file in MiB that a site may send."""

    def __post_init__(self) -> None:
        """Check the options."""
        self.require("wait_s", 0 < self.wait_s <= 86400, "above 0 and at most 86400")
        self.require("part_mb", 1 <= self.part_mb <= 512, "1 to 512")
        self.require("proxy", self.proxy in ("send", "expect"), "'send' or 'expect'")
        self.require("attempts", self.attempts >= 1, "at least 1")
        self.require("largest_mb", self.largest_mb >= 1, "at least 1")

    def clients(self) -> ClientRows:
        """Ask all sites for their clients; see :class:`fedproxy.federation.engines.base.Engine`.

        Raises:
            ClientError: If the hub is not up, or a site does not answer or refuses; the message names it.
        """
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(self._reach(secrets.token_hex(16), Path(folder))) as sites,
        ):
            try:
                sites.greet()
            except CourierError as error:
                raise ClientError(f"engine.name=flower: {error}") from error
            return ClientRows.elsewhere(sites.rows, converse=sites.converse)

    def start(self, make_client: Callable[[], Client], remote: RemoteClient, folder: Path) -> RemoteSites:
        """Say hello to all sites and bring them the proxy.

        Raises:
            ClientError: If the hub is not up, or a site does not answer or refuses; the message names it.
        """
        options = remote.options
        proxy = Bundle.of_folder(Path(options["proxy"]))
        setup = Setup(
            proxy.sha256,
            proxy.size,
            options["dtype"],
            options["trainable"],
            options["max_input_tokens"],
            options["max_target_tokens"],
            options["long_rows"],
            options["quantization"],
            list(remote.plugins),
        )
        sites = self._reach(_run_id(folder), folder / "tmp_sites")
        try:
            sites.bring(setup, proxy, send=self.proxy == "send")
        except CourierError as error:
            sites.close()
            raise ClientError(f"engine.name=flower: {error}") from error
        except BaseException:
            sites.close()
            raise
        return sites

    def _reach(self, run: str, folder: Path) -> RemoteSites:
        """Return the sites, not yet greeted.

        Raises:
            ConfigError: If the hub has not registered a site that is asked for.
        """
        hub = Path(self.hub)
        known = registered(hub)
        unknown = sorted(set(self.sites).difference(known))
        if unknown or not known:
            which = f"no site {unknown[0]!r}{nearest(unknown[0], known)}" if unknown else "no site"
            raise ConfigError(f"engine.sites: the hub in engine.hub={self.hub} has registered {which}")
        terms = Terms(self.wait_s, self.attempts, self.part_mb << 20, self.largest_mb << 20)
        link = Link(lambda: FlowerCourier(hub), terms, folder)
        return RemoteSites(link, run, self.sites or known, folder)


def _run_id(folder: Path) -> str:
    """Return the word by which sites know this run; it is made once and says nothing."""
    note = folder.parent / "server" / "sites.json"
    if note.exists():
        known = read_json(note, dict).get("run")
        if not isinstance(known, str) or not re.fullmatch("[0-9a-f]{32}", known):
            raise CheckpointError(f"{note} does not name the run; use another output_dir")
        return known
    made = secrets.token_hex(16)
    write_json(note, {"run": made})
    return made

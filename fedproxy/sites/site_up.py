"""What ``python -m fedproxy.site up`` does: serve the server's messages, and keep Flower's SuperNode running."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from fedproxy.errors import ConfigError
from fedproxy.files import private_folder, write_json
from fedproxy.interrupts import check_interrupt
from fedproxy.locks import locked
from fedproxy.privacy.registration import FOLDER
from fedproxy.sites.probe import freed, probe
from fedproxy.sites.programs import Program
from fedproxy.sites.relay_user import handed_over
from fedproxy.sites.resident import Resident
from fedproxy.sites.service import Service
from fedproxy.sites.signing import register_site
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import SiteRows
from fedproxy.wire.flower import Flower

Say = Callable[[str], None]
_LOOK_S, _PROBE_S, _STRANGER_S, _SETTLED_S = 0.5, 30.0, 180.0, 60.0
REFUSED = "Exit Code: 305"
"""What a SuperNode's log says when the hub does not let it in."""


def up(path: Path, *, say: Say, until: Callable[[], bool] = lambda: False) -> None:
    """Serve the server's messages until told to end.

    Raises:
        ConfigError: If the site cannot start.
        DataError: If its rows cannot be used.
    """
    place = SitePlace.read(path)
    config, folder = place.config, private_folder(place.folder)
    for what, file in (("key", config.server.key), ("ca", config.server.ca)):
        if not place.path(file).is_file():
            raise ConfigError(f"server.{what}: there is no {place.path(file)}; run site init, or ask the hub's owner")
    with locked(folder, "folder"):
        if not freed(config.node_port):
            raise ConfigError(f"node_port={config.node_port} is in use by another program; choose another")
        rows = SiteRows(place.rows(), folder / "rows", least=config.policy.least_rows)
        if config.peers or (folder / FOLDER).exists():  # of peers that were taken out, too
            register_site(place)
        resident = Resident(place, rows)
        service = Service(resident.serve, folder / "socket", config.relay_user)
        node = _supernode(place, service.path)
        try:
            node.start()
            left_out = f"; left out by policy.least_rows: {', '.join(rows.few)}" if rows.few else ""
            shown = ", ".join(f"{name} {count}" for name, count in rows.items())
            say(f"site {config.name!r} is up: {shown} rows{left_out}")
            _watch(place, node, say, until)
        finally:
            node.end()
            service.close()
            resident.close()
            (folder / "state.json").unlink(missing_ok=True)
    say(f"site {config.name!r} has ended")


def _supernode(place: SitePlace, socket: Path) -> Program:
    config, folder = place.config, place.folder.absolute()
    home, key = folder / "flower", place.path(config.server.key).absolute()
    ca = place.path(config.server.ca).absolute()
    flower = Flower(home, config.flower)
    private_folder(home)
    more = {"FEDPROXY_SITE_SOCKET": str(socket)}
    if config.relay_user:
        home, key, ca = handed_over(config.relay_user, folder, key, ca)
        flower = Flower(home, config.flower)
        more["HOME"] = str(home)
    return Program(
        "SuperNode",
        flower.supernode(config.server.address, ca, key, config.node_port),
        flower.environment(**more),
        place.folder / "logs" / "supernode.log",
        user=config.relay_user,
        reasons={REFUSED: "the hub does not let it in: it counts its last life for a minute, or does not know its key"},
    )


def _watch(place: SitePlace, node: Program, say: Say, until: Callable[[], bool]) -> None:
    """Keep the SuperNode running, and say when the way to the hub breaks or comes back."""
    config, next_probe, before, refused_since, ended = place.config, 0.0, "", 0.0, 0.0
    while not until():
        check_interrupt()
        said = node.look()
        if said:
            say(said)
            ended = time.monotonic()
            refused_since = (refused_since or time.monotonic()) if REFUSED in node.tail() else 0.0
        if time.monotonic() - ended > _SETTLED_S:
            refused_since = 0.0
        if refused_since and time.monotonic() - refused_since > _STRANGER_S:
            say(f"the hub has refused this site for {_STRANGER_S:g} s: give {config.server.key}.pub to its owner")
            refused_since = 0.0
        if time.monotonic() >= next_probe:
            found = probe(config.server.address, place.path(config.server.ca))
            bad = [finding for finding in found if not finding.ok]
            now = str(bad[0]) if bad else f"{config.server.address} answers"
            write_json(place.folder / "state.json", {"pid": os.getpid(), "hub": now, "ok": not bad and node.runs})
            if now != before:
                say(now)
            before, next_probe = now, time.monotonic() + _PROBE_S
        time.sleep(_LOOK_S)

"""What ``python -m fedproxy.site`` does."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedproxy.errors import ConfigError, FedProxyError, one_line
from fedproxy.files import parse_json, private_folder, read_whole, write_json, write_text
from fedproxy.interrupts import check_interrupt
from fedproxy.locks import locked
from fedproxy.modules.devices import one_device
from fedproxy.modules.trainer import make_trainer
from fedproxy.sites.keys import expires, make_site_key
from fedproxy.sites.probe import Finding, is_port_free, probe
from fedproxy.sites.programs import Program
from fedproxy.sites.relay_user import handed_over
from fedproxy.sites.resident import Resident
from fedproxy.sites.service import Service
from fedproxy.sites.signing import register_site
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import SiteRows, trained_on
from fedproxy.wire.flower import Flower

Say = Callable[[str], None]
_log = logging.getLogger("fedproxy.site")
_LOOK_S, _PROBE_S, _STRANGER_S = 0.5, 30.0, 180.0
REFUSED = "Exit Code: 305"
"""What a SuperNode's log says when the hub does not let it in."""
_TEXT = """\
# A data owner's side of a federation: python -m fedproxy.site check {file}, then up {file}
name: {name}                 # as the hub registers it
server:
  address: {address}         # the hub's front door
  ca: {folder}/keys/ca.crt   # the hub's owner gives it to you
  key: {folder}/keys/site    # yours; its .pub goes to the hub's owner
clients:
  {name}:
    files: {{rows: rows.jsonl}}   # rows with a prompt and a target column; paths begin at this file
    # prompt_column: prompt
    # target_column: target
    # format: {{name: prompt_target}}   # or chat, ...; see data.format in docs/configuration.md
    # holdout: 0.1             # a share that is not trained on, to score models on here
policy:                      # what the server may ask for; looked at here, whatever it asks
  trainables: [lora]
  most_rounds: 100
  most_epochs: 3
  least_rows: 20
  largest_mib: 2048
  figures: losses            # or counts: no losses leave
  statistics: false          # Fisher, Gram and SCAFFOLD tensors do not leave
  personal: true             # personal tensors may be handed in after the last round
  # most_clip: 1.0           # updates must be clipped to this norm ...
  # least_noise: 0.5         # ... and noised at least so much
  plugins: []                # modules of the server's that may be imported here
folder: {folder}
workers: auto
trainer: {{accelerator: auto, devices: auto, precision: 32-true}}
node_port: {node_port}       # on this machine alone
# peers: {{}}                  # signing keys of other sites' clients, for privacy.secure_aggregation; check shows yours
# relay_user: flower         # Flower runs as this user, who cannot read the rows; start the site as root then
# flower: /opt/flower/bin    # Flower's commands, where they are installed apart
"""


def init(path: Path, *, name: str, address: str, node_port: int, say: Say) -> None:
    """Write a site's file, unless there is one, and make its key.

    Raises:
        ConfigError: If the file that is there cannot be used.
    """
    if not path.exists():
        facts = {"file": path.name, "name": name, "address": address, "node_port": node_port, "folder": path.stem}
        write_text(path, _TEXT.format(**facts))
    place = SitePlace.read(path)
    key = place.path(place.config.server.key)
    make_site_key(key)
    say(f"{path} is the site's file: write in where your rows are, and what is allowed")
    say(f"give {key}.pub to the hub's owner, and put their ca.crt at {place.path(place.config.server.ca)}")


def check(path: Path, *, say: Say) -> int:
    """Try data, model, key, certificate, clock and connection, and say what is wrong; 0 where nothing is."""
    place = SitePlace.read(path)
    found = [*_looked_at(place), *probe(place.config.server.address, place.path(place.config.server.ca))]
    for finding in found:
        say(str(finding))
    bad = sum(not finding.ok for finding in found)
    say("all is well: python -m fedproxy.site up may start" if not bad else f"{bad} of {len(found)} need mending")
    return 0 if not bad else 1


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
        if not is_port_free(config.node_port):
            raise ConfigError(f"node_port={config.node_port} is in use by another program; choose another")
        rows = SiteRows(place.rows(), folder / "rows", least=config.policy.least_rows)
        if config.peers:
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


def status(path: Path, *, say: Say) -> int:
    """Say whether a site is up, how it reaches the hub, and what it did last; 0 where all is well."""
    place = SitePlace.read(path)
    try:
        state = parse_json(read_whole(place.folder / "state.json", most=1 << 16), dict)
        os.kill(int(state["pid"]), 0)
    except (OSError, ValueError, KeyError):
        say(f"site {place.config.name!r} is down; start it by python -m fedproxy.site up {path}")
        return 1
    say(f"site {place.config.name!r} is up; hub: {one_line(state.get('hub', 'unknown'))}")
    for line in _last_lines(place.folder / "journal.jsonl", 5):
        round_ = f" round {line['round']}" if line.get("round") else ""
        say(f"{line.get('time')} {line.get('kind')}{round_}: {one_line(line.get('outcome', ''))}")
    return 0 if state.get("ok") else 1


def _looked_at(place: SitePlace) -> list[Finding]:
    config = place.config
    found = []
    try:
        rows = place.rows()
        few = [name for name, own in rows.items() if trained_on(own) < config.policy.least_rows]
        shown = ", ".join(f"{name} {trained_on(own)} rows" for name, own in rows.items())
        more = f", of which policy.least_rows={config.policy.least_rows} leaves out {', '.join(few)}" if few else ""
        found.append(Finding("data", len(few) < len(rows), shown + more))
    except FedProxyError as error:
        found.append(Finding("data", False, one_line(error)))
    found.append(_trains(config.trainer))
    found.append(_key(place.path(config.server.key)))
    found.append(_signing(place))
    try:
        command = Flower(place.folder / "flower", config.flower).command("flower-supernode")
        found.append(Finding("Flower", True, command))
    except ConfigError as error:
        found.append(Finding("Flower", False, str(error)))
    try:
        left = expires(place.path(config.server.ca))
        found.append(Finding("authority", True, f"ca.crt holds until {left:%Y-%m-%d}"))
    except ConfigError as error:
        found.append(Finding("authority", False, str(error)))
    return found


def _signing(place: SitePlace) -> Finding:
    try:
        shown = ", ".join(f"{client} {key}" for client, key in register_site(place).items())
    except FedProxyError as error:
        return Finding("signing keys", False, one_line(error))
    return Finding("signing keys", True, f"for peers of other sites, where sums are secure: {shown}")


def _trains(trainer: dict[str, Any]) -> Finding:
    try:
        make_trainer(one_device(trainer))
    except Exception as error:  # Lightning's own, for a device that is not there
        return Finding("model", False, f"the trainer does not start here ({one_line(error, 160)}); change trainer")
    return Finding("model", True, f"the trainer starts ({trainer.get('accelerator')}, {trainer.get('precision')})")


def _key(path: Path) -> Finding:
    if not path.is_file():
        return Finding("key", False, f"there is no {path}; run python -m fedproxy.site init")
    if path.stat().st_mode & 0o077:
        return Finding("key", False, f"others on this machine can read {path}; chmod 600 it")
    return Finding("key", True, f"{path} is readable by its owner alone")


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
    config, next_probe, before, refused_since = place.config, 0.0, "", 0.0
    while not until():
        check_interrupt()
        said = node.look()
        if said:
            say(said)
            refused_since = (refused_since or time.monotonic()) if REFUSED in node.tail() else 0.0
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


def _last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            lines = file.read().splitlines()[-count:]
        return [parse_json(line, dict) for line in lines]
    except (OSError, ValueError):
        return []

"""What ``python -m fedproxy.hub`` does."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedproxy.config.loading import build
from fedproxy.errors import ConfigError, one_line
from fedproxy.files import parse_json, private_folder, read_whole, write_bytes, write_json, write_text
from fedproxy.interrupts import check_interrupt
from fedproxy.locks import locked
from fedproxy.names import check_name, file_stem
from fedproxy.sites.front_door import nginx_command, write_front_door
from fedproxy.sites.hub_config import HubConfig, HubPlace
from fedproxy.sites.keys import check_public_key, expires, make_authority, make_certificate
from fedproxy.sites.probe import freed, is_port_free, probe
from fedproxy.sites.programs import Program
from fedproxy.sites.sockets import socket_folder
from fedproxy.wire.flower import LINK
from fedproxy.yaml_files import parse_yaml

_UP_S, _LOOK_S, _PROBE_S = 60.0, 0.5, 30.0
_TEXT = """\
# The server's side of a federation: python -m fedproxy.hub up {file}
hosts: {hosts}           # names or addresses that sites reach this machine by
port: {port}                   # the only port that is reached from outside
folder: hub                  # keys, registrations, Flower's files, logs; runs name it as engine.hub
superlink_port: {superlink}         # on this machine alone
front_door: nginx            # or external, with folder/front_door/ as a pattern
# listen: 0.0.0.0
# nginx: /usr/sbin/nginx
# flower: /opt/flower/bin    # Flower's commands, where they are installed apart
"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class HubInit:
    """Options of ``hub init``."""

    hosts: list[str] = field(default_factory=lambda: ["localhost"])
    """Names or addresses that sites reach this machine by."""
    port: int = 8443
    """Port of the front door."""
    superlink_port: int = 9093
    """Port on this machine alone that Flower's SuperLink listens on."""


def init(path: Path, asked: HubInit, *, say: Say) -> None:
    """Write a hub's file, unless there is one, and make its keys; its certificate is made anew.

    Raises:
        ConfigError: If the hosts or ports cannot be used, or the file that is there.
    """
    if not path.exists():
        hosts = json.dumps(asked.hosts)
        facts = {"hosts": hosts, "port": asked.port, "superlink": asked.superlink_port}
        text = _TEXT.format(file=one_line(path.name), **facts)
        build(HubConfig, parse_yaml(text), "")
        write_text(path, text)
    place = HubPlace.read(path)
    for folder in (place.folder, place.keys, place.registered):
        private_folder(folder)
    make_authority(place.keys)
    make_certificate(place.keys, place.config.hosts)
    write_front_door(place)
    say(
        f"{path} is the hub's file; its certificate is for {', '.join(place.config.hosts)} until "
        f"{expires(place.keys / 'hub.crt'):%Y-%m-%d}"
    )
    say(f"give every site {place.keys / 'ca.crt'} and the address {place.config.hosts[0]}:{place.config.port}")


def register(path: Path, name: str, key: Path, *, say: Say) -> None:
    """Note a site's key by name; a hub that is up takes it at once.

    Raises:
        ConfigError: If name or key cannot be used, or are another site's.
    """
    place = HubPlace.read(path)
    check_name(name, "site")
    data = check_public_key(key)
    note = private_folder(place.registered) / f"{file_stem(name)}.pub"
    for other in place.registered.glob("*.pub"):
        if other != note and other.read_bytes().split()[:2] == data.split()[:2]:
            raise ConfigError(f"{key} is the key of another site already ({other.stem}); every site has its own")
    if note.exists() and note.read_bytes().split()[:2] != data.split()[:2]:
        raise ConfigError(f"site {name!r} has another key already; remove {note}, or choose another name")
    write_bytes(note, data)
    write_json(note.with_suffix(".json"), {"name": name})
    if is_up(place):
        _register_all(place)
        say(f"site {name!r} is registered")
    else:
        say(f"site {name!r} will be registered when the hub comes up")


def up(path: Path, *, say: Say, until: Callable[[], bool] = lambda: False) -> None:
    """Run the hub until it is told to end.

    Raises:
        ConfigError: If it cannot start.
    """
    place = HubPlace.read(path)
    config = place.config
    if not (place.keys / "hub.key").exists():
        raise ConfigError(f"{place.keys} holds no keys; run python -m fedproxy.hub init {path} first")
    place.flower.version()
    with locked(place.folder, "folder"):
        for key in ("port", "superlink_port"):
            wanted = key == "superlink_port" or config.front_door == "nginx"
            if wanted and not freed(getattr(config, key)):
                raise ConfigError(f"{key}={getattr(config, key)} is in use by another program; choose another")
        sockets = socket_folder(place.folder / "sockets")
        programs = _programs(place, sockets)
        try:
            for program in programs:
                program.start()
            _wait_until_up(place, programs)
            _register_all(place)
            write_json(place.folder / LINK, _link(place, sockets))
            say(f"hub is up: {config.hosts[0]}:{config.port}, {len(_known(place))} sites registered")
            _watch(place, programs, say, until)
        finally:
            with suppress(OSError):
                (place.folder / LINK).unlink()
            for program in reversed(programs):
                program.end()
            shutil.rmtree(sockets, ignore_errors=True)
    say("hub has ended")


def status(path: Path, *, say: Say) -> int:
    """Say what of a hub runs and which sites are online; the exit status is 0 where all of it does."""
    place = HubPlace.read(path)
    ok = is_up(place)
    say(f"hub: {'up' if ok else 'down'}; certificate until {expires(place.keys / 'hub.crt'):%Y-%m-%d}")
    for finding in probe(_own_address(place), place.keys / "ca.crt"):
        ok = ok and finding.ok
        say(str(finding))
    known = _known(place)
    online = place.flower.online() if is_up(place) else {}
    for name in sorted(known):
        say(f"site {name!r}: {online.get(known[name], 'not registered yet' if not known[name] else 'unknown')}")
    return 0 if ok else 1


def is_up(place: HubPlace) -> bool:
    """Return whether the hub has come up, and its SuperLink still answers."""
    return (place.folder / LINK).exists() and not is_port_free(place.config.superlink_port)


def _programs(place: HubPlace, sockets: Path) -> list[Program]:
    flower, logs = place.flower, place.folder / "logs"
    flower.write_connection(place.config.superlink_port, place.keys / "ca.crt")
    environment = flower.environment(FEDPROXY_HUB_SOCKETS=str(sockets))
    command = flower.superlink(
        place.keys.absolute(), place.config.superlink_port, place.folder.absolute() / "superlink.db"
    )
    programs = [Program("SuperLink", command, environment, logs / "superlink.log")]
    if place.config.front_door == "nginx":
        write_front_door(place)
        command = nginx_command(place)
        programs.append(Program("front door", command, {"PATH": environment["PATH"]}, logs / "front_door.log"))
    return programs


def _wait_until_up(place: HubPlace, programs: list[Program]) -> None:
    until = time.monotonic() + _UP_S
    external = place.config.front_door == "external"
    while True:
        check_interrupt()
        ended = [program for program in programs if not program.runs]
        if ended:
            tail = one_line(ended[0].tail()[-600:])
            raise ConfigError(f"the {ended[0].name} ended at once ({tail}); see {ended[0].log}")
        found = probe(
            f"127.0.0.1:{place.config.superlink_port}" if external else _own_address(place), place.keys / "ca.crt"
        )
        if any(finding.what == "connection" and finding.ok for finding in found):
            return
        if time.monotonic() > until:
            raise ConfigError(f"the hub does not come up in {_UP_S:g} s: {found[-1].said}; see {programs[0].log}")
        time.sleep(_LOOK_S)


def _watch(place: HubPlace, programs: list[Program], say: Say, until: Callable[[], bool]) -> None:
    while not until():
        check_interrupt()
        for program in programs:
            said = program.look()
            if said:
                say(said)
        time.sleep(_LOOK_S)


def _own_address(place: HubPlace) -> str:
    own = place.config.listen
    return f"{'127.0.0.1' if own == '0.0.0.0' else own}:{place.config.port}"


def _link(place: HubPlace, sockets: Path) -> dict[str, str]:
    return {
        "home": str(place.flower.home.absolute()),
        "flower": place.config.flower,
        "sockets": str(sockets),
    }


def _known(place: HubPlace) -> dict[str, str]:
    """Return the sites that are noted, each with its id at the SuperLink where it has one."""
    found = {}
    for note in sorted(place.registered.glob("*.json")):
        with suppress(OSError, ValueError, KeyError):
            said = parse_json(read_whole(note, most=1 << 12), dict)
            found[str(said["name"])] = str(said.get("node", ""))
    return found


def _register_all(place: HubPlace) -> None:
    """Register the sites that the SuperLink does not know yet."""
    for note in sorted(place.registered.glob("*.json")):
        said = parse_json(read_whole(note, most=1 << 12), dict)
        if not said.get("node"):
            before = set(_known(place).values())
            node = place.flower.register(note.with_suffix(".pub"), said["name"])
            if not node:  # it took the key before and did not say so in time
                others = set(place.flower.online()) - before
                node = others.pop() if len(others) == 1 else "registered"
            write_json(note, {**said, "node": node})

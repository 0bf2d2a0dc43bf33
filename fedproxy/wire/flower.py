"""Flower's command lines, all of them, and the courier that speaks to the relay of a run.

FedProxy imports nothing of Flower: it starts its programs and talks to a relay, which lies beside this package as an
application of Flower's and uses what Flower calls stable.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedRWPair
from pathlib import Path
from typing import Any

from fedproxy.errors import ConfigError, one_line
from fedproxy.files import parse_json, private_folder, read_json
from fedproxy.wire.courier import NO_ANSWER, NONE_YET, TOO_LARGE, CourierError, Node, Reply
from fedproxy.wire.frames import NOTHING, BrokenFrameError, Head, Source, receive, send

VERSIONS = ((1, 42), (1, 44))
"""The first version of Flower whose command lines these are, and the first whose they may not be."""
RELAY = Path(__file__).parent.parent / "sites" / "relay"
"""The relay application."""
LINK = "link.json"
"""File in a hub's folder that says how a run reaches it."""
SITES = "sites"
"""Folder in a hub's folder that says which sites are registered."""
_SUBMIT_S, _CONNECT_S, _ANSWER_S = 120.0, 120.0, 600.0
_CONNECTION = "hub"
_POLL_S = "0.3"


@dataclass(frozen=True)
class Flower:
    """Flower's commands of one installation, and the folder for its own files.

    Args:
        home: ``FLWR_HOME``.
        folder: Folder of the commands; empty takes those beside this Python, or on the PATH.
    """

    home: Path
    folder: str = ""

    def command(self, name: str) -> str:
        """Return the path of one of Flower's commands.

        Raises:
            ConfigError: If it is not there.
        """
        places = [self.folder] if self.folder else [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        found = shutil.which(name, path=os.pathsep.join(places))
        if found is None:
            raise ConfigError(
                f"Flower's command {name} is not in {self.folder or 'the folder of this Python'}; pip install "
                f"'fedproxy[flower]', or name the folder of its commands under flower"
            )
        return found

    def version(self) -> str:
        """Return the version of these commands.

        Raises:
            ConfigError: If they are not there, or not of a version that is known.
        """
        said = self._run("--version").stdout
        found = re.search(r"(\d+)\.(\d+)[\w.]*", said)
        first, beyond = (".".join(map(str, version)) for version in VERSIONS)
        if found is None or not VERSIONS[0] <= (int(found[1]), int(found[2])) < VERSIONS[1]:
            has = found[0] if found else one_line(repr(said), 40)
            raise ConfigError(
                f"Flower must be {first} or newer, below {beyond}, got {has}; pip install 'fedproxy[flower]'"
            )
        return found[0]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of Flower's processes: no telemetry, no look for updates, no secrets of ours."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "TZ") if name in os.environ}
        own = {
            "FLWR_HOME": str(self.home.absolute()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL_S,
            "PATH": os.pathsep.join([str(Path(self.command("flwr")).parent), kept.get("PATH", "")]),
        }
        return {**kept, **own, **more}

    def superlink(self, keys: Path, port: int, database: Path) -> list[str]:
        """Return the command of the SuperLink, which listens on this machine alone."""
        return [
            self.command("flower-superlink"),
            *("--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "hub.crt")),
            *("--ssl-keyfile", str(keys / "hub.key"), "--enable-supernode-auth"),
            *("--host", "127.0.0.1", "--port", str(port), "--database", str(database)),
            "--disable-runtime-dependency-installation",
        ]

    def supernode(self, address: str, ca: Path, key: Path, port: int) -> list[str]:
        """Return the command of a site's SuperNode."""
        return [
            self.command("flower-supernode"),
            *("--superlink", address, "--root-certificates", str(ca), "--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]

    def register(self, public_key: Path, name: str) -> str:
        """Register a site's key by name, and return its id; empty where the key is registered already.

        Raises:
            ConfigError: If it cannot be done.
        """
        try:
            return str(self._ask("supernode", "register", str(public_key), _CONNECTION, "--name", name)["node-id"])
        except ConfigError as error:
            if "already in use" in str(error):
                return ""
            raise

    def online(self) -> dict[str, str]:
        """Return the state of every registered site, by its id.

        Raises:
            ConfigError: If the SuperLink does not answer.
        """
        said = self._ask("supernode", "list", _CONNECTION)
        return {str(node["node-id"]): one_line(node["status"], 20) for node in said["nodes"]}

    def start_relay(self, token: str) -> None:
        """Start a run of the relay; nothing that sites see of it but a random word.

        Raises:
            ConfigError: If the SuperLink does not take it.
        """
        self._ask("run", str(RELAY), _CONNECTION, "-c", f'token="{token}"')

    def write_connection(self, port: int, ca: Path) -> None:
        """Write how Flower's own commands reach the SuperLink."""
        text = (
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(str(ca.absolute()))}\n'
        )
        private_folder(self.home)
        (self.home / "config.toml").write_text(text)

    def _ask(self, *words: str) -> dict[str, Any]:
        done = self._run(*words, "--format", "json")
        said = done.stdout or done.stderr
        with suppress(ValueError):
            answer = parse_json(done.stdout, dict)
            if answer.get("success"):
                return answer
            said = str(answer.get("error-message") or said)
        raise ConfigError(f"flwr {words[0]} failed ({one_line(said)}); is the hub up?")

    def _run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        line, env = [self.command("flwr"), *words], self.environment()
        try:
            return subprocess.run(line, env=env, capture_output=True, text=True, timeout=_SUBMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"flwr {words[0]} gave no answer in {_SUBMIT_S:g} s; is the hub up?") from None
        except OSError as error:
            raise ConfigError(f"{line[0]} cannot be started ({error.strerror})") from error


class FlowerCourier:
    """Speaks to the relay of a run through a Unix socket that only this user can open.

    Args:
        hub: Folder of the hub.

    Raises:
        CourierError: If the hub is not up, or the relay does not come.
    """

    def __init__(self, hub: Path) -> None:
        self._socket, self._stream = _relay_of(hub)

    def nodes(self) -> Sequence[Node]:
        """Return the registered sites; see :class:`fedproxy.wire.courier.Courier`."""
        return [Node(node["id"], node["name"], node["online"]) for node in self._ask({"op": "nodes"})["nodes"]]

    def push(self, to: Mapping[str, Head], payload: Source, ttl_s: float) -> Mapping[str, str]:
        """Send messages; see :class:`fedproxy.wire.courier.Courier`."""
        lines = [{"node": node, "head": head} for node, head in to.items()]
        found = self._ask({"op": "push", "to": lines, "ttl": ttl_s}, payload)["ids"]
        return dict(zip(to, found, strict=True))

    def pull(self, message: str, payload: Path, *, most: int) -> Reply:
        """Look for a reply; see :class:`fedproxy.wire.courier.Courier`."""
        line = {"op": "pull", "id": message, "most": most, "too_large": TOO_LARGE}
        said = self._ask(line, answer=payload, most=most)
        match said:
            case {"state": "reply", "text": str(text)}:
                try:
                    return Reply("reply", parse_json(text, dict))
                except ValueError:
                    return Reply("error", {}, NO_ANSWER)
            case {"state": "error", "code": int(code)}:
                return Reply("error", {}, code)
        return NONE_YET

    def close(self) -> None:
        """Hang up, which ends the relay's run."""
        with suppress(OSError):
            self._stream.close()
        self._socket.close()

    def _ask(self, line: Head, payload: Source = NOTHING, *, answer: Path | None = None, most: int = 0) -> Head:
        try:
            send(self._stream, line, payload)
            said = receive(self._stream, answer or Path(os.devnull), most=most)
        except (BrokenFrameError, OSError) as error:
            raise CourierError(f"the relay at the hub is gone ({one_line(error)})") from error
        if "error" in said:
            raise CourierError(f"Flower reports {one_line(said['error'], 80)}")
        return said


def registered(hub: Path) -> list[str]:
    """Return the names of the sites that are registered at a hub, online or not.

    Raises:
        ConfigError: If it is no hub's folder.
    """
    if not hub.is_dir():
        raise ConfigError(f"engine.hub={hub} is no hub's folder; run python -m fedproxy.hub init, or name it")
    notes = (read_json(note, dict, remedy="register the site again") for note in (hub / SITES).glob("*.json"))
    return sorted(str(note.get("name")) for note in notes)


def _relay_of(hub: Path) -> tuple[socket.socket, BufferedRWPair]:
    """Start a relay and return the connection that it opens."""
    if not (hub / LINK).is_file():
        raise CourierError(f"the hub in {hub} is not up; start python -m fedproxy.hub up, then resume=auto")
    link = read_json(hub / LINK, dict, error=CourierError, remedy="start the hub again")
    flower = Flower(Path(link["home"]), link["flower"])
    token = secrets.token_hex(16)
    place = Path(link["sockets"]) / f"{token}.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind(str(place))
            place.chmod(0o600)
            listening.listen(1)
            listening.settimeout(_CONNECT_S)
            flower.start_relay(token)
            opened = listening.accept()[0]
        except ConfigError as error:
            raise CourierError(f"{error}; start python -m fedproxy.hub up") from error
        except OSError as error:
            raise CourierError(f"the relay at the hub does not come ({one_line(error)}); see its log") from error
        finally:
            place.unlink(missing_ok=True)
    opened.settimeout(_ANSWER_S)
    stream = opened.makefile("rwb")
    try:
        receive(stream, Path(os.devnull), most=0)
    except (BrokenFrameError, OSError) as error:
        opened.close()
        raise CourierError("the relay at the hub went away at once; see its log") from error
    return opened, stream

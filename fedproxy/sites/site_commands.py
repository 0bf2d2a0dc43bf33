"""What ``python -m fedproxy.site init`` and ``status`` do; they import nothing heavy."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.config.loading import build
from fedproxy.errors import one_line
from fedproxy.files import parse_json, read_whole, write_text
from fedproxy.names import check_name
from fedproxy.sites.keys import make_site_key
from fedproxy.sites.site_config import SiteConfig, SitePlace
from fedproxy.yaml_files import parse_yaml

Say = Callable[[str], None]
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*(:[0-9]{1,5})?")
_TEXT = """\
# A data owner's side of a federation: python -m fedproxy.site check {file}, then up {file}
name: {name}                 # as the hub registers it
server:
  address: {address}         # the hub's front door
  ca: {ca}   # the hub's owner gives it to you
  key: {key}    # yours; its .pub goes to the hub's owner
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
  # most_clip: 1.0           # updates must be clipped to this norm
  # most_epsilon: 3          # no round without a budget, at most this over all runs (needs evaluate: false)
  # secure: true             # no update leaves that is not masked
  plugins: []                # modules of the server's that may be imported here
folder: {folder}
workers: auto
trainer: {{accelerator: auto, devices: auto, precision: 32-true}}
node_port: {node_port}       # on this machine alone
# peers: {{}}                  # signing keys of other sites' clients, for privacy.secure_aggregation; check shows yours
# relay_user: flower         # Flower runs as this user, who cannot read the rows; start the site as root then
# flower: /opt/flower/bin    # Flower's commands, where they are installed apart
"""


@dataclass(frozen=True)
class SiteInit:
    """Options of ``site init``."""

    name: str = ""
    """As the hub registers the site; empty is the file's name."""
    address: str = "localhost:8443"
    """Host and port of the hub's front door."""
    node_port: int = 9094
    """Port on this machine alone that Flower's SuperNode and its relay speak through."""


def init(path: Path, asked: SiteInit, *, say: Say) -> None:
    """Write a site's file, unless there is one, and make its key.

    Raises:
        ConfigError: If a name or the address cannot be used, or the file that is there.
    """
    if not path.exists():
        write_text(path, _text(path, asked))
    place = SitePlace.read(path)
    key = place.path(place.config.server.key)
    make_site_key(key)
    say(f"{path} is the site's file: write in where your rows are, and what is allowed")
    say(f"give {key}.pub to the hub's owner, and put their ca.crt at {place.path(place.config.server.ca)}")


def _text(path: Path, asked: SiteInit) -> str:
    """Return the text of a new file.

    Raises:
        ConfigError: If it could not be read again.
    """
    name, folder = check_name(asked.name or path.stem, "name"), check_name(path.stem, "the file's name")
    facts = {
        "file": one_line(path.name), "name": _written(name), "address": _written(asked.address),
        "node_port": asked.node_port, "folder": _written(folder), "ca": _written(f"{folder}/keys/ca.crt"),
        "key": _written(f"{folder}/keys/site"),
    }  # fmt: skip
    text = _TEXT.format(**facts)
    build(SiteConfig, parse_yaml(text), "")
    return text


def _written(text: str) -> str:
    """Return a text as YAML has it, in quotes where it would be something else without them."""
    plain = _PLAIN.fullmatch(text) is not None and parse_yaml(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


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


def _last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            lines = file.read().splitlines()[-count:]
        return [parse_json(line, dict) for line in lines]
    except (OSError, ValueError):
        return []

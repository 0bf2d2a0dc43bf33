"""`python -m fedproxy.sites.demo [FOLDER] [key=value ...]`: a hub and two sites on this machine, and one run over them.

Each party has a folder, keys and processes of its own, as their owners would start them; the line between them is TLS
on loopback. What one machine cannot show: users and machines that keep the parties apart.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fedproxy.command import run_command
from fedproxy.errors import ConfigError, one_line
from fedproxy.files import private_folder, write_text
from fedproxy.sites.hub_config import HubPlace

USAGE = """
usage: python -m fedproxy.sites.demo [FOLDER] [key=value ...]

Starts a hub and two sites below FOLDER (runs/demo_sites), runs recipe fedproxy_llama over them for two rounds, and ends
them again. It needs pip install 'fedproxy[flower]' and nginx.

examples:
  python -m fedproxy.sites.demo
  python -m fedproxy.sites.demo /tmp/demo recipe=fedproxy_tiny data.rows_per_task=64
"""
_SITES = {"ward_a": (0, 2), "ward_b": (2, 4)}
_UP_S, _END_S = 180.0, 90.0


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration and return the run's exit status.

    Raises:
        ConfigError: If the recipe has too few tasks for two sites, or hub or site does not come up.
    """
    from fedproxy.config import load_config

    words = [word for word in arguments if "=" in word]
    folder = private_folder(Path(next((word for word in arguments if "=" not in word), "runs/demo_sites"))).absolute()
    if not any(word.startswith("recipe=") for word in words):
        words = ["recipe=fedproxy_llama", *words]
    config = load_config(["federation.rounds=2", *words])
    tasks, rows = config.data.tasks, config.data.rows_per_task
    if len(tasks) < 4:
        raise ConfigError(f"the demonstration gives each of two sites two of a recipe's tasks, and it has {len(tasks)}")
    ports = (f"port={free_port()}", f"superlink_port={free_port()}")
    finish(folder, "hub", "init", "hub.yaml", "hosts=[localhost]", *ports)
    port = HubPlace.read(folder / "hub.yaml").config.port  # of the first time, where there was one
    for name, (first, last) in _SITES.items():
        finish(folder, "site", "init", f"{name}.yaml", f"name={name}")
        (folder / name / "keys" / "ca.crt").write_bytes((folder / "hub/keys/ca.crt").read_bytes())
        write_text(folder / f"{name}.yaml", _site(name, tasks[first:last], rows, port, config.trainer))
        finish(folder, "hub", "register", "hub.yaml", name, f"{name}/keys/site.pub")
    started: list[subprocess.Popen[bytes]] = []
    try:
        bring_up(started, folder, "hub", "hub.yaml", "hub is up")
        for name in _SITES:
            bring_up(started, folder, "site", f"{name}.yaml", "is up")
        far = ("engine.name=flower", f"engine.hub={folder / 'hub'}", "data.partition.name=sites")
        own = ("federation.rounds=2", "data.partition.clients=4", f"output_dir={folder / 'run'}", "resume=auto")
        started.append(command(folder, "fit", *own, *words, *far))
        return started[-1].wait()
    finally:
        end_all(started)


def end_all(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes, the run first, and those that do not end in time by force."""
    for process in reversed(started):
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + _END_S
    for process in reversed(started):
        try:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _site(name: str, tasks: Sequence[str], rows: int | None, port: int, trainer: dict[str, Any]) -> str:
    clients = "".join(f"  {task}: {{tasks: [{task}], rows_per_task: {rows or 'null'}}}\n" for task in tasks)
    return (
        f"name: {name}\nfolder: {name}\nserver: {{address: 'localhost:{port}', ca: {name}/keys/ca.crt, "
        f"key: {name}/keys/site}}\nclients:\n{clients}policy: {{least_rows: 20}}\n"
        f"node_port: {free_port()}\nworkers: 1\n"
        f"trainer: {json.dumps(trainer)}\n"
    )


def finish(folder: Path, *words: str) -> None:
    """Run a command to its end.

    Raises:
        ConfigError: If it fails, or does not end in time.
    """
    process = command(folder, *words)
    try:
        failed = process.wait(timeout=_UP_S)
    except subprocess.TimeoutExpired:
        end_all([process])
        failed = 1
    if failed:
        raise ConfigError(f"python -m fedproxy.{' '.join(words)} failed in {folder}; mend what it says above")


def bring_up(started: list["subprocess.Popen[bytes]"], folder: Path, what: str, file: str, sign: str) -> None:
    """Start a hub or a site, note it among what is started, and wait until it says that it is up.

    Raises:
        ConfigError: If it ends, or says nothing within the time; quotes the end of its log.
    """
    log = folder / f"{Path(file).stem}.log"
    with open(log, "wb") as output:
        process = command(folder, what, "up", file, output=output)
    started.append(process)
    until = time.monotonic() + _UP_S
    while sign not in log.read_text():
        if process.poll() is not None or time.monotonic() > until:
            raise ConfigError(f"{what} {file} does not come up ({one_line(log.read_text()[-200:])}); see {log}")
        time.sleep(0.2)
    print(log.read_text().splitlines()[0], flush=True)


def command(folder: Path, *words: str, output: BinaryIO | None = None) -> "subprocess.Popen[bytes]":
    """Start one of FedProxy's commands in a folder; a run stays in this process's own."""
    line = [sys.executable, "-m", f"fedproxy.{words[0]}", *words[1:]]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    where = Path.cwd() if words[0] == "fit" else folder
    return subprocess.Popen(line, cwd=where, env={**os.environ, **paths}, stdout=output, stderr=output)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


if __name__ == "__main__":
    run_command(main, USAGE)

"""A hub and its sites on this machine, as their owners start them: own processes, own folders, own keys, TLS."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

FLOWER = os.environ.get("FEDPROXY_FLOWER", str(Path(sys.executable).parent))
"""Folder of Flower's commands."""


def skip_where_it_cannot_run():
    if not (Path(FLOWER) / "flower-superlink").exists():
        pytest.skip("Flower is not installed: pip install '.[flower]', or set FEDPROXY_FLOWER to its commands' folder")
    if not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("the hub's front door needs nginx: apt-get install nginx-light")


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


class Command:
    """One of FedProxy's commands in a process of its own."""

    def __init__(self, folder, *words):
        self.log = folder / f"{words[0]}_{Path(words[-1]).stem if words[0] != 'fit' else 'run'}.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"fedproxy.{words[0]}", *words[1:]],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            )

    @property
    def said(self):
        return self.log.read_text()

    def until(self, pattern, seconds=120):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.said):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.2)
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=90)


def run(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


class Loopback:
    """A federation of some sites."""

    def __init__(self, folder, sites, policy=""):
        self.folder, self.port, self.sites = folder, free_port(), {}
        hub = ["port=" + str(self.port), "superlink_port=" + str(free_port())]
        assert run(folder, "fedproxy.hub", "init", "hub.yaml", "hosts=[localhost]", *hub)[0] == 0
        self.write(folder / "hub.yaml", f"flower: {FLOWER}\n")
        self.hub = Command(folder, "hub", "up", "hub.yaml").until("hub is up")
        for name, tasks in sites.items():
            self.add(name, tasks, policy)
            assert run(folder, "fedproxy.hub", "register", "hub.yaml", name, f"{name}/keys/site.pub")[0] == 0
            self.start(name)
        for name in sites:
            self.sites[name].until("is up")

    def add(self, name, tasks, policy=""):
        """Make a site that is not registered."""
        address = f"address=localhost:{self.port}"
        words = ("init", f"{name}.yaml", f"name={name}", address, f"node_port={free_port()}")
        assert run(self.folder, "fedproxy.site", *words)[0] == 0
        shutil.copy(self.folder / "hub/keys/ca.crt", self.folder / name / "keys/ca.crt")
        clients = "".join(f"  {task}: {{tasks: [{task}], rows_per_task: 24}}\n" for task in tasks)
        own = (
            f"name: {name}\nfolder: {name}\nnode_port: {free_port()}\nflower: {FLOWER}\nworkers: 1\n"
            f"server: {{address: 'localhost:{self.port}', ca: {name}/keys/ca.crt, key: {name}/keys/site}}\n"
            f"trainer: {{accelerator: cpu, devices: 1, precision: 32-true}}\nclients:\n{clients}{policy}"
        )
        (self.folder / f"{name}.yaml").write_text(own)

    def start(self, name):
        self.sites[name] = Command(self.folder, "site", "up", f"{name}.yaml")
        return self.sites[name]

    def pids(self, word):
        """Return the processes of this federation's folder, or ports, whose command line has a word."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes().decode().replace("\0", " ") if entry.name.isdigit() else ""
            except OSError:
                continue
            if word in line and str(self.folder) in line and "keeper.py" not in line:
                found.append(int(entry.name))
        return found

    @staticmethod
    def write(path, text):
        path.write_text(path.read_text() + text)

    def close(self):
        for command in (*self.sites.values(), self.hub):
            command.end()

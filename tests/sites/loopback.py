"""A federation on this machine, set up by the commands of docs/deploy.md: own processes, folders and keys, TLS."""

import os
import re
import shlex
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
PAGE = Path(__file__).parent.parent.parent / "docs/deploy.md"


def skip_where_it_cannot_run():
    if not (Path(FLOWER) / "flower-superlink").exists():
        pytest.skip("Flower is not installed: pip install '.[flower]', or set FEDPROXY_FLOWER to its commands' folder")
    if not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("the hub's front door needs nginx: apt-get install nginx-light")


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def commands_of(page):
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL))
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("python -m fedproxy")]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class Command:
    """One of FedProxy's commands in a process of its own."""

    def __init__(self, folder, module, *words, name):
        self.log = folder / f"{name}.log"
        with open(self.log, "ab") as log:
            line = [sys.executable, "-m", module, *words]
            self.process = subprocess.Popen(line, cwd=folder, stdout=log, stderr=log, env=environment())

    @property
    def said(self):
        return self.log.read_text()

    def until(self, pattern, seconds=120):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.said):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, f"no {pattern!r} in {seconds} s:\n{self.said}"
            time.sleep(0.2)
        return self

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        return end_all([self])[0]


def end_all(commands):
    """End commands, all at once, and return their exit statuses."""
    for command in commands:
        if command.process.poll() is None:
            command.process.terminate()
    codes = []
    for command in commands:
        try:
            codes.append(command.process.wait(timeout=90))
        except subprocess.TimeoutExpired:
            command.kill()
            codes.append(None)
    return codes


def run(folder, module, *words):
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


class Loopback:
    """A federation of some sites.

    Every command of the page is run as it stands there, but for ports, and once more for each further site. Its last
    one, which starts a run, is left to tests.
    """

    def __init__(self, folder, sites):
        self.folder, self.port, self.tasks = folder, free_port(), sites
        self.sites, self.hub, self.outputs, self.fit = {}, None, {}, []
        try:
            for module, *words in commands_of(PAGE):
                if module == "fedproxy.fit":
                    self.fit = words
                else:
                    self._follow(module, words)
        except BaseException:
            self.close()
            raise

    def _follow(self, module, words):
        names = list(self.tasks) if "ward_a" in " ".join(words) else [None]
        if words[0] in ("check", "status"):
            names = names[:1]
        for name in names:
            own = [word.replace("ward_a", name or "").replace(":8443", f":{self.port}") for word in words]
            own = [word.replace("hub.example", "localhost") for word in own]
            if words[0] == "up":
                self.start(name)
                continue
            if words[0] == "init":
                own += [f"node_port={free_port()}"] if name else [f"port={self.port}", f"superlink_port={free_port()}"]
            self.do(module, *own)
            if words[0] == "init":
                self._mend(name or "hub")
        if words[0] == "up" and names != [None]:
            for name in names:
                self.sites[name].until(f"localhost:{self.port} answers")

    def do(self, module, *words):
        """Run a command, which must succeed."""
        code, said = run(self.folder, module, *words)
        assert code == 0, (module, words, said)
        self.outputs[f"{module} {words[0]}"] = said

    def _mend(self, name):
        """Do what the page asks an owner to do: say where the rows are, and put the hub's certificate in place."""
        path = self.folder / f"{name}.yaml"
        text = path.read_text() + f"flower: {FLOWER}\n"
        if name != "hub":
            shutil.copy(self.folder / "hub/keys/ca.crt", self.folder / name / "keys/ca.crt")
            tasks = self.tasks.get(name, ("tiny_sums",))
            clients = "".join(f"  {task}: {{tasks: [{task}], rows_per_task: 24}}\n" for task in tasks)
            text = re.sub(r"clients:\n.*?(?=policy:)", f"clients:\n{clients}", text, flags=re.DOTALL)
            text = text.replace("accelerator: auto", "accelerator: cpu").replace("workers: auto", "workers: 1")
        path.write_text(text)

    def add(self, name):
        """Make a site that is not registered."""
        self.do("fedproxy.site", "init", f"{name}.yaml", f"address=localhost:{self.port}", f"node_port={free_port()}")
        self._mend(name)

    def start(self, name):
        """Start a site, or the hub, where there is no name."""
        if name is None:
            self.hub = Command(self.folder, "fedproxy.hub", "up", "hub.yaml", name="hub").until("hub is up")
            return self.hub
        self.sites[name] = Command(self.folder, "fedproxy.site", "up", f"{name}.yaml", name=name)
        return self.sites[name]

    def run(self, *words):
        """Start the page's run, on a small model, with words added."""
        page = [
            word.replace("=fedproxy_llama", "=fedproxy_tiny").replace("clients=2", "clients=4") for word in self.fit
        ]
        return Command(self.folder, "fedproxy.fit", *page, *words, name="run")

    def pids(self, *words):
        """Return the processes of this federation's folder whose command line has all of some words."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes().decode().replace("\0", " ") if entry.name.isdigit() else ""
            except OSError:
                continue
            if all(word in line for word in (str(self.folder), *words)) and "keeper.py" not in line:
                found.append(int(entry.name))
        return found

    def close(self):
        """End all that runs, and return the exit statuses."""
        return end_all([command for command in (*self.sites.values(), self.hub) if command is not None])

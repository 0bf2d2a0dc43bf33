"""Sites over Flower on one machine, one of them killed and started again all the time: the run ends, memory is flat.

    python -m benchmarks.flapping_site FOLDER                                # 10 sites, 20 rounds, killed every 30 s
    python -m benchmarks.flapping_site FOLDER sites=3 rounds=6 flower=/opt/flower/bin

Each site has one client with rows of the tiny recipe. After every round the resident memory (Linux) of what stays up at
the hub and at the first site is noted in FOLDER/memory.jsonl: SuperLink and hub; SuperNode, site and worker. Started
again in the same folder, the measurement goes on with the run. `growth` compares the last three rounds with the three
after `warm`, and `dropped` counts the rounds that did without a site, with the reasons given.
"""

import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.many_clients import descendants, resident_kib
from fedproxy.sites.demo import command, end_all, finish, free_port
from fedproxy.sites.hub_config import HubPlace

TASKS = ("tiny_colors", "tiny_sums", "tiny_opposites", "tiny_places")
DEFAULTS = {"sites": 10, "rounds": 20, "every": 30, "warm": 8}
STAYS = ("flower-superlink", "fedproxy.hub", "flower-supernode", "fedproxy.site", "engines.worker")
UP_S, RUN_S = 600.0, 7200.0


def main(arguments: Sequence[str]) -> dict[str, object]:
    """Run it and return the figures."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    folder = Path(next(argument for argument in arguments if "=" not in argument)).absolute()
    flower = given.pop("flower", "")
    numbers = {name: int(given.pop(name, default)) for name, default in DEFAULTS.items()}
    names = [f"site_{number:02d}" for number in range(numbers["sites"])]
    folder.mkdir(parents=True, exist_ok=True)
    set_up(folder, names, flower)
    hub = up(folder, "hub", "hub")
    sites, fit = [], None
    try:
        wait_for(folder / "hub.log", "hub is up")
        sites += [up(folder, "site", name) for name in names]
        for name in names:
            wait_for(folder / f"{name}.log", "is up")
        words = (
            "recipe=fedproxy_tiny", "evaluation.tasks=[]", "engine.name=flower", f"engine.hub={folder / 'hub'}",
            "data.partition.name=sites", f"data.partition.clients={len(names)}", f"output_dir={folder / 'run'}",
            f"federation.rounds={numbers['rounds']}", "engine.wait_s=20", "federation.round_timeout_s=120",
            "federation.min_clients=1", "resume=auto", *(f"{key}={value}" for key, value in given.items()),
        )  # fmt: skip
        fit = command(folder, "fit", *words)
        watch(folder, fit, hub, sites, names, numbers["every"])
        status = fit.returncode
    finally:
        end_all([process for process in (hub, *sites, fit) if process is not None])
    return {**numbers, "status": status, **figures(folder, numbers["warm"])}


def set_up(folder: Path, names: Sequence[str], flower: str) -> None:
    """Make keys and files of hub and sites, where there are none."""
    made = (folder / "hub.yaml").exists()
    finish(folder, "hub", "init", "hub.yaml", f"port={free_port()}", f"superlink_port={free_port()}")
    if made:
        return
    port = HubPlace.read(folder / "hub.yaml").config.port
    with open(folder / "hub.yaml", "a") as file:
        file.write(f"flower: '{flower}'\n")
    for number, name in enumerate(names):
        finish(folder, "site", "init", f"{name}.yaml")
        (folder / f"{name}/keys/ca.crt").write_bytes((folder / "hub/keys/ca.crt").read_bytes())
        client = {"tasks": [TASKS[number % len(TASKS)]], "rows_per_task": 24, "seed": number}
        server = {"address": f"localhost:{port}", "ca": f"{name}/keys/ca.crt", "key": f"{name}/keys/site"}
        trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
        site = {
            "name": name, "folder": name, "node_port": free_port(), "workers": 1, "flower": flower, "server": server,
            "clients": {name: client}, "trainer": trainer,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(site))  # YAML, too
        finish(folder, "hub", "register", "hub.yaml", name, f"{name}/keys/site.pub")


def up(folder: Path, what: str, name: str):
    """Start a hub or a site; its log begins anew."""
    with open(folder / f"{name}.log", "wb") as log:
        return command(folder, what, "up", f"{name}.yaml", output=log)


def wait_for(log: Path, sign: str) -> None:
    """Wait until a log says something."""
    until = time.monotonic() + UP_S
    while sign not in log.read_text():
        if time.monotonic() > until:
            raise SystemExit(f"{log} does not say {sign!r}")
        time.sleep(0.5)


def watch(folder: Path, fit, hub, sites, names: Sequence[str], every: int) -> None:
    """Kill the last site again and again from the first round on, and note memory after every round, until the end."""
    until, next_kill, before = time.monotonic() + RUN_S, float("inf"), len(rounds(folder))
    while fit.poll() is None:
        if time.monotonic() > until:
            raise SystemExit("the run does not end")
        done = len(rounds(folder))
        if done > before:
            memory = {"round": done, "hub": resident(hub), "site": resident(sites[0])}
            with open(folder / "memory.jsonl", "a") as file:
                file.write(json.dumps(memory) + "\n")
            print(memory, flush=True)
            before, next_kill = done, min(next_kill, time.monotonic() + every)
        if time.monotonic() > next_kill:
            sites[-1].send_signal(signal.SIGKILL)
            sites[-1].wait()
            sites[-1] = up(folder, "site", names[-1])
            next_kill = time.monotonic() + every
        time.sleep(0.5)


def rounds(folder: Path) -> list[dict]:
    """Return what the run says of its rounds so far."""
    try:
        return [json.loads(line) for line in (folder / "run/rounds.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def resident(process) -> int:
    """Return the resident KiB of what stays of a hub or a site."""
    total = 0
    for pid in (process.pid, *descendants(process.pid)):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(word in line for word in STAYS) and "keeper.py" not in line:
            total += resident_kib(pid)
    return total


def figures(folder: Path, warm: int) -> dict[str, object]:
    """Return what the folder holds of measurements."""
    memory = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    growth = {}
    for who in ("hub", "site"):
        kib = [line[who] for line in memory]
        growth[who] = statistics.median(kib[-3:]) / statistics.median(kib[warm : warm + 3] or kib)
    dropped = Counter(
        f"{client}: {why}" for record in rounds(folder) for client, why in record.get("dropped", {}).items()
    )
    return {"rounds_done": len(rounds(folder)), "growth": growth, "dropped": dict(dropped)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(json.dumps(main(sys.argv[1:]), indent=2))

"""Thousands of clients, a few per round: neither memory nor time may grow with rounds or with their number.

    python -m benchmarks.many_clients                                       # 10,000 clients, 32 per round, 20 rounds
    python -m benchmarks.many_clients engine.name=workers engine.workers=2 rounds=30

Each client of the tiny model has four rows of its own. Each measurement is a run of its own in a fresh process;
resident memory (Linux) of the main process and, with `engine.name=workers`, of all processes that it started together
is read after every round. `growth` compares the last round with the tenth (by then the latest clients' rows fill the
cache) and `per_number` the last round's memory with that of a run with `fewer` clients, for `main` and `workers`.
`start_up` is the seconds from the recipe to the first round (imports left out), `round` the median seconds of a round,
each with many and with fewer clients; `seconds` is a client's training time in the first and the second half of the
rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan_check import children

DEFAULTS = {"clients": 10_000, "fewer": 100, "per_round": 32, "rounds": 20, "warm": 10}
ROWS = 4


def main(arguments: Sequence[str]) -> dict[str, object]:
    """Run both sizes and return the figures."""
    given = dict(argument.split("=", 1) for argument in arguments)
    numbers = {name: int(given.pop(name, default)) for name, default in DEFAULTS.items()}
    overrides = [f"{key}={value}" for key, value in given.items()]
    many, few = (_run(numbers[size], numbers, overrides) for size in ("clients", "fewer"))
    seconds = many["client_seconds"]
    half = len(seconds) // 2
    resident = {role: many[role] for role in ("main", "workers") if many[role][-1]}
    return {
        **numbers,
        "growth": {role: kib[-1] / kib[numbers["warm"] - 1] for role, kib in resident.items()},
        "start_up": [size["start_up"][0] for size in (many, few)],
        "round": [statistics.median(size["round_seconds"]) for size in (many, few)],
        "seconds": [statistics.median(seconds[:half]), statistics.median(seconds[half:])],
        "per_number": {role: kib[-1] / few[role][-1] for role, kib in resident.items()},
        "resident_kib": resident,
    }


def run(clients: int, per_round: int, rounds: int, overrides: Sequence[str], folder: Path) -> dict[str, list[float]]:
    """Run the tiny recipe with many clients in this process.

    Returns:
        After each round, resident KiB of ``main``, this process, and of ``workers``, all that it started together (0
        where there are none); and the round's mean ``client_seconds``.
    """
    from fedproxy.config import load_config
    from fedproxy.pipeline.display import Display
    from fedproxy.pipeline.run import run as run_recipe

    names = ("main", "workers", "client_seconds", "round_seconds", "start_up")
    figures: dict[str, list[float]] = {name: [] for name in names}
    started = time.monotonic()

    class Watch(Display):
        def round(self, record, rounds):
            figures["main"].append(resident_kib(os.getpid()))
            figures["workers"].append(sum(map(resident_kib, descendants(os.getpid()))))
            figures["client_seconds"].append(record["client_seconds"] / len(record["clients"]))
            figures["round_seconds"].append(record["seconds"])
            figures["start_up"] = figures["start_up"] or [time.monotonic() - started - record["seconds"]]

    file = folder / "rows.jsonl"
    file.write_text("".join(map(_row, range(ROWS * clients))))
    settings = [
        "recipe=fedproxy_tiny", "data.tasks=[]", f"data.files.sums={file}", "data.rows_per_task=null",
        f"data.partition={{name: iid, clients: {clients}}}",
        f"federation.clients_per_round={per_round}", f"federation.rounds={rounds}", "evaluation.models=[]",
        f"output_dir={folder / 'run'}", *overrides,
    ]  # fmt: skip
    run_recipe(load_config(settings), Watch())
    return figures


def descendants(pid: int) -> list[int]:
    """Return the processes that another one started, and those that they started."""
    own = children(pid)
    return [*own, *(far for near in own for far in descendants(near))]


def resident_kib(pid: int) -> int:
    """Return the KiB that a process has resident, 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def _row(number: int) -> str:
    first, second = divmod(number, 97)
    row = {"prompt": f"Question: How much is {first} plus {second}? Answer:", "target": f" {first + second}"}
    return json.dumps(row) + "\n"


def _run(clients: int, numbers: dict[str, int], overrides: Sequence[str]) -> dict[str, list[float]]:
    call = f"run({clients}, {numbers['per_round']}, {numbers['rounds']}, sys.argv[2:], Path(sys.argv[1]))"
    imports = "import json, sys; from pathlib import Path; from benchmarks.many_clients import run"
    script = f"{imports}; print(json.dumps({call}))"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", script, folder, *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))

"""Throughput of the engine `workers`: two workers with one thread each against one worker with one thread.

    python -m benchmarks.engines                     # SmolLM2-135M as the proxy, about 10 minutes on 2 cores
    python -m benchmarks.engines model=asset:tiny-llama rounds=2 rows=8

Both sides and the engine `in_process` (one thread) take turns, so that a busy machine is busy for all of them; ratios
are medians over turns. `overhead` is the share of a round's wall time, with one worker, in which no client trained:
writing and reading the broadcast and the updates, messages, scheduling. Start-up is not in it and printed apart. All
sides must return the same bits, which is checked.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.data.rows import Row
from fedproxy.federation.client.setup import LocalSetup, load
from fedproxy.federation.engines import Engine
from fedproxy.messages import Answer, Dropped, Sites, UpdateFile
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.seeding import ClientSeeds

DEFAULTS = {"model": "asset:smollm2-135m", "rounds": "5", "clients": "8", "rows": "32", "words": "60"}
JOB = {
    "lr": 1e-3, "batch_size": 16, "accumulate": 1, "epochs": 1, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "regularizer": {"name": "none"}, "frozen": [],
}  # fmt: skip


def main(options: dict[str, str]) -> dict[str, object]:
    """Measure and return the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = make_setup(folder, options)
        client = load(device=None, **vars(setup))
        clients = [f"client_{k:03d}" for k in range(int(options["clients"]))]
        seeds = {name: ClientSeeds.of(1, 1, name) for name in clients}
        broadcast = Broadcast(1, client.model.state(), job=JOB, all_seeds=seeds)
        remote = setup.remote([])
        engines = {
            label: Engine.by_name(kind)(**arguments).start(lambda: client, remote, folder / label)
            for label, kind, arguments in (
                ("in_process", "in_process", {"threads": 1}),
                ("1 worker", "workers", {"workers": 1, "threads": 1}),
                ("2 workers", "workers", {"workers": 2, "threads": 1}),
            )
        }
        try:
            return measure(engines, broadcast, clients, int(options["rounds"]))
        finally:
            for engine in engines.values():
                engine.close()


def make_setup(folder: Path, options: dict[str, str]) -> LocalSetup:
    """Write made-up rows for every client and return how a client is made."""
    words = int(options["words"])
    prompt = "Question: " + " ".join(f"word{i % 7}" for i in range(words)) + "\nAnswer:"
    clients = {
        f"client_{k:03d}": [
            Row(prompt, f" {i} is the answer", "made_up", f"{k}/{i}") for i in range(int(options["rows"]))
        ]
        for k in range(int(options["clients"]))
    }
    ClientRows(clients, folder / "rows")
    return LocalSetup(
        proxy=str(resolve(options["model"])),
        dtype="float32",
        trainable={"name": "lora", "r": 8},
        rows=str(folder / "rows"),
        store=str(folder / "kept"),
        max_input_tokens=256,
        max_target_tokens=16,
        trainer={"accelerator": "cpu", "devices": 1},
    )


def measure(engines: dict[str, Sites], broadcast: Broadcast, clients: list[str], rounds: int) -> dict[str, object]:
    """Return seconds per round and ratios; the first turn starts processes and is reported apart."""
    walls: dict[str, list[float]] = {label: [] for label in engines}
    overheads: dict[str, list[float]] = {label: [] for label in engines}
    reference: dict[str, dict[str, torch.Tensor]] = {}
    for turn in range(rounds + 1):
        for label, engine in engines.items():
            started = time.perf_counter()
            answers = list(engine.run(broadcast, clients))
            wall = time.perf_counter() - started
            updates = [_update(answer) for answer in answers]
            walls[label].append(wall)
            overheads[label].append(1 - sum(update.seconds for update in updates) / wall)
            _compare(reference, updates)
            if turn:
                print(f"turn {turn}  {label:10}  {wall:7.2f} s", flush=True)
    steady = {label: values[1:] for label, values in walls.items()}
    ratios = [one / two for one, two in zip(steady["1 worker"], steady["2 workers"], strict=True)]
    return {
        "seconds_per_round": {label: statistics.median(values) for label, values in steady.items()},
        "first_round_seconds": {label: values[0] for label, values in walls.items()},
        "throughput_2_workers_over_1": statistics.median(ratios),
        "throughput_ratios": ratios,
        "overhead_1_worker": statistics.median(overheads["1 worker"][1:]),
        "overhead_in_process": statistics.median(overheads["in_process"][1:]),
        "same_bits": True,
        "clients": len(clients),
        "torch": torch.__version__,
    }


def _update(answer: Answer) -> ClientUpdate:
    """Return an update that may have come as a file."""
    assert not isinstance(answer, Dropped), answer
    return ClientUpdate.load(answer.path) if isinstance(answer, UpdateFile) else answer


def _compare(reference: dict[str, dict[str, torch.Tensor]], updates: list[ClientUpdate]) -> None:
    for update in updates:
        known = reference.setdefault(update.client_id, dict(update.delta))
        for name, tensor in update.delta.items():
            if not torch.equal(tensor, known[name]):
                raise SystemExit(f"{update.client_id}: {name} differs between engines")


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(json.dumps(main({**DEFAULTS, **given}), indent=1))

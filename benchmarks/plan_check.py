"""What `recipes plan` predicts against what a run takes: bytes of every round, peak memory of server and client.

    python -m benchmarks.plan_check                                        # SmolLM2-135M, 1 round, about 4 minutes
    python -m benchmarks.plan_check recipe=fedproxy_tiny data.rows_per_task=8 federation.rounds=2

The run is a process of its own with one worker, so that each role's memory is that of a process (Linux: VmHWM of
/proc). Words beyond the defaults go to the recipe. The plan is told the longest row that the run's clients had, as
`plan.input_tokens` and `plan.target_tokens`, and is otherwise made from the recipe alone.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fedproxy.config import load_config
from fedproxy.federation.client.rows import ClientExamples
from fedproxy.models import load_tokenizer
from fedproxy.pipeline.plan import Plan, plan
from fedproxy.pipeline.planning.memory import CLIENT_PROCESS, SERVER_PROCESS

DEFAULTS = {"recipe": "fedproxy_llama", "data.rows_per_task": "16", "federation.rounds": "1", "evaluation.limit": "5"}
ENGINE = ("engine.name=workers", "engine.workers=1")
POLL_S = 0.05
WORKER = b"fedproxy.federation.engines.worker"


def main(words: list[str]) -> dict[str, object]:
    """Run, plan, print and return the figures."""
    given = dict(word.split("=", 1) for word in words)
    arguments = [f"{key}={value}" for key, value in {**DEFAULTS, **given}.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        server, client = peaks([*arguments, *ENGINE, f"output_dir={folder}"])
        lengths = longest(folder)
        predicted = plan([*arguments, *ENGINE, *(f"plan.{key}={value}" for key, value in lengths.items())])
        figures = {
            "rows": lengths,
            "bytes": compare_bytes(predicted, folder),
            "memory": {
                "server": compare(predicted.peak("server") + SERVER_PROCESS, server),
                "client": compare(predicted.peak("each worker") + CLIENT_PROCESS, client),
            },
        }
    print(json.dumps(figures, indent=1))
    return figures


def peaks(arguments: list[str]) -> tuple[int, int]:
    """Run a recipe and return the peak resident bytes of its main process and of the largest worker."""
    with tempfile.TemporaryFile() as log:
        run = subprocess.Popen([sys.executable, "-m", "fedproxy.fit", *arguments], stdout=log, stderr=log)
        server = client = 0
        while run.poll() is None:
            server = max(server, peak_of(run.pid))
            client = max([client, *(peak_of(pid) for pid in filter(is_worker, children(run.pid)))])
            time.sleep(POLL_S)
        if run.returncode:
            log.seek(0)
            raise SystemExit(log.read().decode()[-2000:])
    return server, client


def children(pid: int) -> list[int]:
    """Return the processes that another one started."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it ended meanwhile
            found += map(int, thread.read_text().split())
    return found


def is_worker(pid: int) -> bool:
    """Return whether a process has begun to be a worker: before, it shows its parent's memory."""
    try:
        return WORKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def peak_of(pid: int) -> int:
    """Return the peak resident bytes of a process, 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def longest(folder: Path) -> dict[str, int]:
    """Return the tokens of the longest row of any client, and the most target tokens of any."""
    data = load_config([f"recipe={folder / 'config.yaml'}"]).data
    examples = ClientExamples(
        folder / "rows",
        load_tokenizer(folder / "proxy"),
        max_input_tokens=data.max_input_tokens,
        max_target_tokens=data.max_target_tokens,
    )
    clients = json.loads((folder / "partition.json").read_text())["clients"]
    rows = [row for client in clients for row in examples[client]]
    target = max(row.target_length for row in rows)
    return {"input_tokens": max(len(row.input_ids) for row in rows) - target, "target_tokens": target}


def compare_bytes(predicted: Plan, folder: Path) -> list[dict[str, bool]]:
    """Return for every round whether both directions agree to the byte."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [
        {
            "up": line["upload_bytes"] == predicted.traffic.all_up(),
            "down": line["download_bytes"] == predicted.traffic.all_down(line["round"]),
        }
        for line in lines
    ]


def compare(predicted: int, measured: int) -> dict[str, float]:
    """Return both in MiB and the error of the prediction."""
    return {
        "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(measured / 2**20),
        "error": round(predicted / measured - 1, 3),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

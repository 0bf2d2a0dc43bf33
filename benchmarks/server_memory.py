"""The server's peak memory in every stage of a whole run on a random Llama of 0.98 B parameters in bfloat16.

    python -m benchmarks.server_memory                                     # two minutes with AMX, far more without
    python -m benchmarks.server_memory file=memory.json federation.rounds=2

Half of the blocks are removed, and two clients train in the server's own process. A stage's peak is resident memory
(Linux: VmHWM of /proc, started afresh after every stage), libraries included, beside what `recipes plan` says of it,
told the longest row that the clients had, and the bound that the project sets itself: 1.15 x the target's bytes + 1
GiB. Words beyond `file` go to the recipe.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plan_check import longest
from fedproxy.data.assets import resolve
from fedproxy.models import load_tokenizer
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.planning.memory import SERVER_PROCESS

DEFAULTS = {
    "recipe": "fedproxy_llama", "target.dtype": "bfloat16", "compression.ratio": "0.5",
    "compression.calibration.rows": "8", "compression.calibration.max_tokens": "64",
    "data.tasks": "[arc_easy, csqa]", "data.rows_per_task": "16",
    "client.batch_size": "4", "federation.rounds": "1", "evaluation.limit": "4",
}  # fmt: skip
STAGES = {"compressed": ("compression",), "round": ("federation",), "evaluated": ("fusion", "evaluation")}
"""The stages that a line of the run ends, by its first word. Fusion has no line of its own."""


def main(words: list[str]) -> dict[str, Any]:
    """Run, plan, print and return the figures."""
    given = dict(word.split("=", 1) for word in words)
    file = given.pop("file", None)
    with tempfile.TemporaryDirectory() as name:
        parameters = write_target(Path(name) / "target")
        arguments = [f"{key}={value}" for key, value in {**DEFAULTS, **given}.items()]
        arguments.append(f"target.path={Path(name) / 'target'}")
        folder = Path(name) / "run"
        found = peaks([*arguments, f"output_dir={folder}"])
        predicted = plan([*arguments, *(f"plan.{key}={value}" for key, value in longest(folder).items())])
        figures: dict[str, Any] = {
            "parameters": parameters,
            "bound_gb": round((1.15 * 2 * parameters + 2**30) / 1e9, 2),
        }
        for stages, peak in found.items():
            foreseen = max(predicted.peak("server", stage) for stage in stages) + SERVER_PROCESS
            figures[" and ".join(stages)] = {
                "measured_gb": gigabytes(peak),
                "predicted_gb": gigabytes(foreseen),
            }
    print(json.dumps(figures, indent=1))
    if file:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def gigabytes(count: float) -> float:
    """Return bytes in GB, to two digits."""
    return round(count / 1e9, 2)


def write_target(folder: Path) -> int:
    """Write a random Llama in bfloat16 with SmolLM2's tokenizer, and return how many parameters it has."""
    tokenizer = load_tokenizer(str(resolve("asset:smollm2-135m")))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=5504, num_hidden_layers=18,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def peaks(arguments: list[str]) -> dict[tuple[str, ...], int]:
    """Run a recipe and return the peak resident bytes of its stages."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "fedproxy.fit", *arguments]
    found: dict[tuple[str, ...], int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        for stages in ended(run):
            found[stages] = max(found.get(stages, 0), take_peak(run.pid))
    if run.returncode:
        raise SystemExit(f"the run ended with exit code {run.returncode}")
    return found


def ended(run: "subprocess.Popen[str]") -> Iterator[tuple[str, ...]]:
    """Show a run's lines, and yield the stages that a line says to be done."""
    assert run.stdout is not None
    for line in run.stdout:
        print(line, end="", flush=True)
        word = re.match(r"\w+", line)
        if word and word[0] in STAGES and (word[0] != "round" or "loss" in line):
            yield STAGES[word[0]]


def take_peak(pid: int) -> int:
    """Return the peak resident bytes of a process, and let the next peak start from what it holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])

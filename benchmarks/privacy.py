"""What privacy costs: DP-SGD against plain training on SmolLM2, in turns, and secure sums against plain uploads.

    python -m benchmarks.privacy dp_sgd --rows 64 --turns 3     # speed in turns, then peak memory, a process each
    python -m benchmarks.privacy secure_sum                      # 40 million numbers

Speed: one proxy, the same rows, batch 16, LoRA of rank 8 on all seven projections, float32; the sides take turns, so
that whatever else the machine does falls on both. Memory: the most that a fresh process held resident.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.data.assets import resolve
from fedproxy.data.examples import Example
from fedproxy.files import flush
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.privacy.dp_sgd import PoissonLoader, PrivateLMModule, PrivateTraining, sampling_of
from fedproxy.privacy.noise import SecretStream
from fedproxy.privacy.secure_sum import encode, masked
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.trainable import Trainable

BATCH, LR = 16, 1e-3
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def examples(count: int) -> list[Example]:
    """Return training rows of ARC easy as cloze questions."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m"))
    found = []
    with (resolve("asset:qa") / "arc_easy/train.jsonl").open() as file:
        for index, line in zip(range(count), file, strict=False):
            document = json.loads(line)
            choices, question = document["choices"], document.get("question") or document["question_stem"]
            answer = choices["text"][choices["label"].index(document["answerKey"])]
            prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
            target = tokenizer(f" {answer}")["input_ids"]
            found.append(Example((*prompt, *target), ((len(prompt), len(prompt) + len(target)),), str(index)))
    return found


def attached(blocks: int):
    """Return the target's first blocks with LoRA on every projection."""
    model = AutoModelForCausalLM.from_pretrained(resolve("asset:smollm2-135m"), dtype=torch.float32)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    return Trainable.by_name("lora")(r=8, alpha=16, modules=MODULES).attach(model, torch.Generator().manual_seed(0))


def sides(trainable, rows: list[Example]) -> dict[str, Callable[[], int]]:
    """Return what trains an epoch, by side; each returns the rows that it went through."""
    options = {"lr": LR, "parameters": trainable.parameters()}
    stream = SecretStream(bytes(32), "benchmark")

    def plain() -> int:
        loader = ExampleDataModule(rows, BATCH, pad_id=0, generator=torch.Generator().manual_seed(0))
        fit(make_trainer({"accelerator": "cpu"}, max_grad_norm=1.0), CausalLMModule(trainable.model, **options), loader)
        return len(rows)

    def private() -> int:
        rate, steps = sampling_of(len(rows), BATCH)
        training = PrivateTraining(1.0, 1.0, rate, steps, steps, BATCH, stream)
        loader = Counted(PoissonLoader(rows, training, pad_id=0))
        module = PrivateLMModule(trainable.model, training, len(rows), **options)
        fit(make_trainer({"accelerator": "cpu"}), module, loader)
        return loader.rows

    return {"plain": plain, "private": private}


class Counted:
    """Counts the rows of batches that pass."""

    def __init__(self, batches) -> None:
        self.batches, self.rows = batches, 0

    def __iter__(self):
        """Yield the batches, and count their rows."""
        for batch in self.batches:
            self.rows += len(batch["input_ids"])
            yield batch


def speed(options: argparse.Namespace) -> dict[str, float]:
    """Return rows per second of both sides and their ratio."""
    work = sides(attached(options.blocks), examples(options.rows))
    seconds, rows = dict.fromkeys(work, 0.0), dict.fromkeys(work, 0)
    for side in work:
        work[side]()  # warm
    for _ in range(options.turns):
        for side, run in work.items():
            started = time.process_time()
            rows[side] += run()
            seconds[side] += time.process_time() - started
    rate = {side: rows[side] / seconds[side] for side in work}
    return {**{f"{side}_rows_per_s": value for side, value in rate.items()}, "speed": rate["private"] / rate["plain"]}


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Return the peak memory of both sides, MiB, and their ratio."""
    peak = {}
    for side in ("plain", "private"):
        command = [sys.executable, "-m", "benchmarks.privacy", "one", "--side", side, "--rows", str(options.rows)]
        done = subprocess.run(
            [*command, "--blocks", str(options.blocks)], check=True, capture_output=True, text=True
        )  # fmt: skip
        peak[side] = float(done.stdout.split()[-1])
    return {**{f"{side}_mib": value for side, value in peak.items()}, "memory": peak["private"] / peak["plain"]}


def secure_sum(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of saving an update of many numbers, plain, and of what masking it takes besides, in turns."""
    numbers = {"w": 0.01 * torch.randn(options.numbers, generator=torch.Generator().manual_seed(0))}
    keys = {f"peer {index}": bytes([index]) * 32 for index in range(1, options.clients)}
    plain, hidden = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.safetensors"
        for _ in range(options.turns):
            for seconds, secure in ((plain, False), (hidden, True)):
                started = time.perf_counter()
                sent = masked(encode(numbers, 1.0, options.clients), "a", keys) if secure else numbers
                ClientUpdate("a", sent, round=1).save(path)
                flush([path])
                seconds.append(time.perf_counter() - started)
    return {"plain_s": min(plain), "secure_s": min(hidden), "ratio": min(hidden) / min(plain)}


def one(options: argparse.Namespace) -> None:
    """Train an epoch of one side and print the most memory that was resident, MiB."""
    sides(attached(options.blocks), examples(options.rows))[options.side]()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dp_sgd", "secure_sum", "one"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=22, help="blocks of the proxy, the first ones of the target")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--numbers", type=int, default=40_000_000)
    parser.add_argument("--clients", type=int, default=4, help="clients of the sum; each pair has a mask")
    parser.add_argument("--side", default="plain")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.what == "one":
        one(options)
        return
    figures = secure_sum(options) if options.what == "secure_sum" else speed(options)
    print(json.dumps(figures), flush=True)
    if options.what == "dp_sgd":
        figures |= memory(options)
        print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

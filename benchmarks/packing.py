"""Tokens per second of training with rows packed side by side, against batches padded row by row, in one run.

    python -m benchmarks.packing                 # 640 rows of mixed length
    python -m benchmarks.packing --rows 64       # a client of few rows, whose batches cannot be of one length

Four sides take turns batch by batch on one proxy (forward and backward pass, LoRA on all projections, batch 16):
batches drawn at random, padded or packed, and batches grouped by length as clients draw them, padded or packed. Row
lengths are drawn as instruction data have them: log-normal, median 60 tokens, cut at 384. Tokens are those of rows,
padding left out.
"""

# ruff: noqa: E402 (the number of threads is set before torch is imported)
import argparse
import json
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=640)
parser.add_argument("--batches", type=int, default=12, help="batches a side, at most an epoch")
parser.add_argument("--blocks", type=int, default=22, help="blocks of the proxy, the first ones of the target")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--cpu", action="store_true", help="count seconds of the processor, on a machine with other work")
parser.add_argument("--json", type=Path, help="write the figures here")
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from fedproxy.data.assets import resolve
from fedproxy.data.batching import batches, collate
from fedproxy.data.packing import pack
from fedproxy.data.tokenisation import Example
from fedproxy.models import Decoder, load_model
from fedproxy.models.probing import check_packing
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll
from fedproxy.strategies.trainable import Trainable

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH, MEDIAN, SPREAD, LONGEST = 16, 60, 0.8, 384


def draw_rows(count: int) -> list[Example]:
    """Return rows of random tokens, the last third of each (at most 64 tokens) the answer."""
    generator = torch.Generator().manual_seed(0)
    lengths = (MEDIAN * (SPREAD * torch.randn(count, generator=generator)).exp()).clamp(8, LONGEST).long().tolist()
    ids = [torch.randint(100, 40_000, (length,), generator=generator).tolist() for length in lengths]
    return [Example(tuple(row), len(row) - min(64, len(row) // 3), str(index)) for index, row in enumerate(ids)]


def orders(rows: list[Example]) -> dict[str, list[list[int]]]:
    """Return the batches of an epoch, drawn at random and grouped by length."""
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    grouped = batches([len(row.input_ids) for row in rows], BATCH, torch.Generator().manual_seed(1))
    return {"random": [part.tolist() for part in torch.split(shuffled, BATCH)], "grouped": grouped}


def main() -> None:
    """Run all sides in turns and print their rates."""
    torch.set_num_threads(options.threads)
    target = load_model(resolve("asset:smollm2-135m"), dtype="float32")
    proxy = Decoder.of(target).subset(list(range(options.blocks)))
    check_packing(proxy)
    trainable = Trainable.by_name("lora")(r=8, modules=MODULES).attach(proxy)
    proxy.train()
    rows, found = draw_rows(options.rows), {}
    sides = {(order, how): plan for order, plan in orders(rows).items() for how in ("padded", "packed")}
    seconds, tokens, width = (dict.fromkeys(sides, 0.0) for _ in range(3))
    count = min(options.batches, len(rows) // BATCH)
    step(proxy, collate(rows[:BATCH], 0))  # the first pass allocates
    for turn in range(count):
        for side, plan in sides.items():
            chosen = [rows[index] for index in plan[turn * len(plan) // count]]
            packed = pack(chosen, 0) if side[1] == "packed" else None
            batch = collate(chosen, 0) if packed is None else packed
            started = time.process_time() if options.cpu else time.perf_counter()
            step(proxy, batch)
            seconds[side] += (time.process_time() if options.cpu else time.perf_counter()) - started
            tokens[side] += sum(len(row.input_ids) for row in chosen)
            width[side] += batch["input_ids"].numel()
            for parameter in trainable.parameters().values():
                parameter.grad = None
    for side in sides:
        found["_".join(side)] = {
            "tokens_per_second": tokens[side] / seconds[side],
            "padding": 1 - tokens[side] / width[side],
        }
        figures = found["_".join(side)]
        print(f"{' '.join(side):16} {figures['tokens_per_second']:8.0f} tokens/s  {figures['padding']:.0%} padding")
    rate = {name: figures["tokens_per_second"] for name, figures in found.items()}
    for order in ("random", "grouped"):
        print(
            f"packed, {order}: {rate[f'{order}_packed'] / rate['random_padded']:.2f} x padded at random, "
            f"{rate[f'{order}_packed'] / rate['grouped_padded']:.2f} x padded by length"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": options.rows, "batches": count, **found}, indent=1) + "\n")


def step(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    """Do one forward and backward pass."""
    logits, targets = answer_logits(model, batch)
    answer_nll(logits, targets).mean().backward()


if __name__ == "__main__":
    main()

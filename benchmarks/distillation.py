"""Distillation on SmolLM2 at 15 of 30 blocks: does it halve the KL to the target, and what does the cache save?

    python -m benchmarks.distillation                      # both parts
    python -m benchmarks.distillation --part kl --steps 100 --json docs/results/distillation.json
    python -m benchmarks.distillation --part kl distillation.lr=1e-3 distillation.train=lora
    python -m benchmarks.distillation --part cache --steps 20
    python -m benchmarks.distillation --target asset:tiny-llama --steps 2    # the script itself, in seconds

Part ``kl`` distils by `fedproxy.modules.distillation.distil`, as a run does, and measures KL(target || proxy) on texts
that distillation did not see, before and after. It ends with exit code 1 where the KL is not halved.

Part ``cache`` takes the same steps with the target run every time and with its outputs read from a warm cache, turn by
turn, so that whatever else the machine does falls on both alike; and once more while the cache is filled.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.data.batching import ShuffledBatches
from fedproxy.data.sources import read_texts
from fedproxy.models import Decoder, load_model, load_tokenizer
from fedproxy.modules.distillation import DistillationModule, mean_kl
from fedproxy.modules.distillation_config import DistillationConfig
from fedproxy.modules.teacher import Teacher
from fedproxy.modules.teacher_cache import TeacherCache
from fedproxy.pipeline.data import text_batches
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.compression.distilling import distil

HELD_OUT, CALIBRATION, SEED = 64, 64, 42
TRAINER = {"accelerator": "cpu", "devices": 1}


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for, print and keep their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("kl", "cache", "both"), default="both")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128, help="longest text")
    parser.add_argument("--target", default="asset:smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of blocks removed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", help="distillation.key=value")
    options = parser.parse_args(words)
    settings = load_config(
        [
            f"target.path={options.target}", "data.tasks=[arc_easy]", f"distillation.steps={options.steps}",
            *options.overrides,
        ]
    ).distillation  # fmt: skip
    torch.manual_seed(SEED)
    path = resolve(options.target) or options.target
    target, tokenizer = load_model(path), load_tokenizer(path)
    text = "asset:tiny-calibration" if "tiny" in options.target else "asset:calibration"
    texts = read_texts(text, settings.rows + HELD_OUT, SEED)
    batch = {"max_tokens": options.tokens, "batch_size": settings.batch_size}
    held_out = text_batches(texts[:HELD_OUT], tokenizer, **batch)
    seen = text_batches(texts[HELD_OUT:], tokenizer, **batch)
    calibration = text_batches(texts[HELD_OUT : HELD_OUT + CALIBRATION], tokenizer, **batch)
    proxy, layer_map = Compressor.by_name("block_influence")(ratio=options.ratio).compress(target, calibration)
    figures: dict[str, Any] = {"settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__}}
    figures |= {"target": options.target, "kept": list(layer_map.proxy_to_target), "threads": torch.get_num_threads()}
    if options.part in ("cache", "both"):
        figures["cache"] = cache_part(proxy, target, seen, settings)
    if options.part in ("kl", "both"):
        before, started = mean_kl(proxy, target, held_out), time.perf_counter()
        draws = torch.Generator().manual_seed(SEED)
        with tempfile.TemporaryDirectory() as folder:
            distil(
                proxy, target, seen, settings=settings, layer_map=layer_map, trainer=TRAINER, generator=draws,
                cache=Path(folder),
            )  # fmt: skip
        seconds = time.perf_counter() - started
        after = mean_kl(proxy, target, held_out)
        figures["kl"] = {"before": before, "after": after, "ratio": after / before, "seconds": seconds}
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if "kl" in figures and figures["kl"]["ratio"] > 0.5:
        sys.exit(f"the KL fell to {figures['kl']['ratio']:.2f} of what it was, not to half")


def cache_part(
    proxy: PreTrainedModel, target: PreTrainedModel, batches: Sequence[dict[str, Tensor]], settings: DistillationConfig
) -> dict[str, Any]:
    """Time steps with the target and with a warm cache in turns, and those that fill the cache."""
    order = ShuffledBatches(batches, torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), target_sha256="", top_k=settings.top_k, max_bytes=2**40)
        live = stepper(proxy, Teacher(target, ()), settings)
        cached = stepper(proxy, Teacher(target, (), cache=cache), settings)
        times: dict[str, list[float]] = {"live": [], "filling": [], "warm": []}
        tokens = 0
        for number, batch in zip(range(settings.steps), order, strict=False):
            if number == 0:
                live(batch)  # the first call of a process pays for much that is not a step
            times["filling"].append(cached(batch))
            turns: list[tuple[str, Callable[[dict[str, Tensor]], float]]] = [("live", live), ("warm", cached)]
            for name, step in turns if number % 2 else turns[::-1]:
                times[name].append(step(batch))
            tokens += int(batch["attention_mask"].sum())
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    total = {name: sum(values) for name, values in times.items()}
    pairs = [a / b for a, b in zip(times["live"], times["warm"], strict=True)]
    return {
        "seconds": total,
        "tokens_per_second": {name: tokens / value for name, value in total.items()},
        "warm_speedup": statistics.median(pairs),
        "filling_cost": total["filling"] / total["live"],
        "bytes_per_token": size / tokens,
    }


def stepper(
    proxy: PreTrainedModel, teacher: Teacher, settings: DistillationConfig
) -> Callable[[dict[str, Tensor]], float]:
    """Return a function that takes one optimiser step on a batch and gives its wall time in seconds."""
    blocks = Decoder.of(proxy).blocks
    tuned = list(blocks.requires_grad_(True).parameters())
    module = DistillationModule(proxy, teacher, tuned, lr=settings.lr, divergence=settings.divergence)
    module.log = lambda *_, **__: None
    optimizer = torch.optim.AdamW(tuned, lr=0.0, weight_decay=0.0, fused=True)  # timed, not trained

    def step(batch: dict[str, Tensor]) -> float:
        started = time.perf_counter()
        module.training_step(batch, 0).backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()

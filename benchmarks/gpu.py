"""What a device does at paper scale: every stage of a run at Llama-2-7B's shape, random bfloat16 weights.

    python -m benchmarks.gpu                    # one GPU with 40 GiB or more; a small shape where there is none
    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --small            # the small shape anywhere: seconds, to see that it works

- influence: Block Influence over texts of 512 tokens, as `fedproxy.compress` runs it.
- lora step: Lightning fit of a 16-block proxy, float32 LoRA of rank 32 on all seven projections. MFU is the operations
  of `fedproxy.pipeline.planning.speed.training_operations` per second, over the device's peak (`--peak-tflops`).
- aggregation: 8 updates of the proxy's LoRA (40 M parameters each) by H-TIES and FedAvg, on the CPU, where runs merge.
- plug-in: fusion of the tuned proxy into the target; `checked` also hashes the target's weights.

Peak memory is what PyTorch allocated on the device at most in that stage; on a CPU what the process had resident so
far. The rate of the LoRA step is what `recipes plan` takes as `plan.tflops`, that of H-TIES as `plan.merge_gb_per_s`.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM

from fedproxy.config import load_config
from fedproxy.data.tokenisation import Example
from fedproxy.models import Decoder, LayerMap, state_sha256
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.modules.datamodule import ExampleDataModule
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.pipeline.planning.outline import target_config
from fedproxy.pipeline.planning.speed import RowLength, training_operations
from fedproxy.protocol import ClientUpdate
from fedproxy.reporting.provenance import hardware, versions
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.compression.block_influence import block_influence
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.trainable import Trainable

RECIPE = "recipe=paper/fedproxy_llama2_7b_heterogeneous"
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 peaks of the makers' data sheets (SXM form), by a word of the device's name."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small shape, as where there is no GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--texts", type=int, default=64, help="texts of 512 tokens for the influence pass")
    parser.add_argument("--batch", type=int, default=16, help="rows of 64 + 128 tokens in a LoRA step")
    parser.add_argument("--steps", type=int, default=20, help="LoRA steps, of which the first three do not count")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak in bfloat16; known for a few")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(words)
    device, small = torch.device(options.device), options.small or options.device == "cpu"
    target = random_target(device, small=small)
    depth = target.config.num_hidden_layers
    kept = tuple(range(0, depth, 2))
    results: dict[str, Any] = {"shape": "small" if small else "Llama-2-7B", "hardware": hardware()}
    stages: dict[str, Callable[[], dict[str, float]]] = {}
    stages["influence"] = lambda: influence(target, options.texts, 32 if small else 512)
    proxy = Decoder.of(target).subset(kept)
    lora = Trainable.by_name("lora")(r=4 if small else 32, alpha=8 if small else 64).attach(proxy)
    stages["lora step"] = lambda: lora_steps(lora, options, RowLength(8, 8) if small else RowLength(64, 128))
    stages["aggregation"] = lambda: aggregation(lora.state())
    stages["plug-in"] = lambda: plug_in(target, lora, kept)
    for name, stage in stages.items():
        reset_peak(device)
        results[name] = {**stage(), "peak_gib": peak_gib(device)}
        figures = ", ".join(f"{key} {value:.4g}" for key, value in results[name].items())
        print(f"{name:12} {figures}", flush=True)
    results["versions"] = versions()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


def random_target(device: torch.device, *, small: bool) -> Any:
    """Return a model of the recipe's target's architecture with random bfloat16 weights."""
    config = target_config(load_config([RECIPE]))
    if small:
        config.update({**SMALL, "num_hidden_layers": 4, "vocab_size": 256, "max_position_embeddings": 64})
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def influence(target: Any, texts: int, tokens: int) -> dict[str, float]:
    """Time the Block Influence pass, batches of 16 texts, after one batch to warm up."""
    ids = torch.randint(3, target.config.vocab_size, (texts, tokens), generator=torch.Generator().manual_seed(0))
    decoder, batches = Decoder.of(target), list(ids.split(16))
    block_influence(decoder, batches[:1])
    seconds = timed(lambda: block_influence(decoder, batches), target.device)
    return {"seconds": seconds, "tokens_per_s": texts * tokens / seconds}


def lora_steps(lora: Any, options: argparse.Namespace, row: RowLength) -> dict[str, float]:
    """Time training steps as a client takes them."""
    model, device = lora.model, torch.device(options.device)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (options.batch * options.steps, row.tokens), generator=rng)
    examples = [
        Example(tuple(tokens), ((row.input_tokens, row.tokens),), str(k)) for k, tokens in enumerate(ids.tolist())
    ]
    clock = _Clock(device)
    options_of_trainer = {"accelerator": device.type, "devices": 1, "precision": "32-true"}
    trainer = make_trainer(options_of_trainer, max_epochs=1, callbacks=[clock])
    module = CausalLMModule(model, lr=1e-4, parameters=lora.parameters())
    fit(trainer, module, ExampleDataModule(examples, options.batch, pad_id=0, generator=rng))
    model.to(device)
    seconds = clock.median(skip=3)
    rate = options.batch * training_operations(Decoder.of(model), lora, row) / seconds / 1e12
    figures = {"seconds": seconds, "tokens_per_s": options.batch * row.tokens / seconds, "tflops": rate}
    peak = options.peak_tflops or known_peak(device)
    return figures if peak is None else {**figures, "mfu": rate / peak}


class _Clock(Callback):
    """Takes the time of every training step, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._started = device, [], 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        wait(self.device)
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        wait(self.device)
        self.seconds.append(time.perf_counter() - self._started)

    def median(self, skip: int) -> float:
        """Return the median of the steps after the first ones."""
        counted = sorted(self.seconds[skip:] or self.seconds)
        return counted[len(counted) // 2]


def aggregation(state: dict[str, torch.Tensor], clients: int = 8) -> dict[str, float]:
    """Time the merging of updates of the state's shapes, the best of three."""
    updates = []
    for k in range(clients):
        rng = torch.Generator().manual_seed(k)
        delta = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in state.items()}
        updates.append(ClientUpdate(f"client_{k}", delta, num_examples=k + 1))
    read = sum(update.bytes for update in updates)
    figures = {"parameters": float(sum(tensor.numel() for tensor in state.values()))}
    for name in ("h_ties", "fedavg"):
        rule = Aggregator.by_name(name)()
        best = min(timed(lambda rule=rule: rule.aggregate(updates), torch.device("cpu")) for _ in range(3))
        figures |= {f"{name}_seconds": best, f"{name}_gb_per_s": read / best / 1e9}
    return figures


def plug_in(target: Any, lora: Any, kept: tuple[int, ...]) -> dict[str, float]:
    """Time fusion with and without the check that this is the target that was compressed."""
    device, merged = target.device, {}
    merging = timed(lambda: merged.update(lora.merged_weights()), device)
    proxy = lora.detach()
    fusion, layer_map = Fusion.by_name("plug_in")(), LayerMap(kept, state_sha256(target))
    after = {**proxy.state_dict(), **merged}
    return {
        "merge_lora_seconds": merging,
        "seconds": timed(lambda: fusion.join(target, proxy, after, layer_map), device),
        "checked_seconds": timed(lambda: fusion.fuse(target, proxy, after, layer_map), device),
    }


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, the device's work included."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def known_peak(device: torch.device) -> float | None:
    """Return the device's peak TFLOP/s in bfloat16, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)


def reset_peak(device: torch.device) -> None:
    """Let the device's peak start afresh."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Return the peak of the device's memory; on a CPU, of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()

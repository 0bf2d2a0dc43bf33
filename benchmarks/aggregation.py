"""Speed and memory of aggregation: ours against mergekit, PEFT and Flower on the same tensors, in one run.

    python benchmarks/aggregation.py                     # 8 clients x 10 M float32 parameters
    python benchmarks/aggregation.py --size 40           # a 7B model's LoRA
    python benchmarks/aggregation.py --stream /tmp/s --size 250   # from files

Contenders take turns, the best of the rounds counts, and every time is given as a multiple of one plain weighted sum
over the same tensors. Peers that are not installed are left out (benchmarks/peers.py says how to get them).
"""

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path

import torch

from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.aggregators import Aggregator

sys.path.insert(0, str(Path(__file__).parent))
from peers import flower_rules, mergekit_rule, peft_rules

TENSOR = 131_072
"""Coordinates of a tensor in the benchmark: a LoRA factor of rank 32 at 4096 inputs, as in the paper's runs."""


def make_updates(clients, size):
    """Return random updates of ``size`` parameters each."""
    tensors = size // TENSOR
    updates = []
    for k in range(clients):
        rng = torch.Generator().manual_seed(k)
        delta = {f"layer{i:05d}": torch.randn(TENSOR, generator=rng) for i in range(tensors)}
        updates.append(ClientUpdate(f"client{k}", delta, num_examples=k + 1))
    return updates


def plain_sum(updates):
    """One weighted sum, tensor by tensor: the unit of all times."""
    total = sum(update.num_examples for update in updates)
    merged = {}
    for name in updates[0].delta:
        out = updates[0].delta[name] * (updates[0].num_examples / total)
        for update in updates[1:]:
            out.add_(update.delta[name], alpha=update.num_examples / total)
        merged[name] = out
    return merged


def read_all(updates):
    """Read every input once and write nothing: the floor of memory traffic."""
    return sum(float(tensor.sum()) for update in updates for tensor in update.delta.values())


def ours(name, **options):
    """Return a call of one of our rules; ``figures`` goes to ``aggregate``."""
    figures = options.pop("figures", True)
    rule = Aggregator.by_name(name)(**options)
    return lambda updates: rule.aggregate(updates, figures=figures).delta


def flower_call(name, *arguments):
    """Return a call of one of Flower's rules on the same memory."""
    rule = getattr(flower_rules(), name)

    def call(updates):
        return rule([([t.numpy() for t in u.delta.values()], u.num_examples) for u in updates], *arguments)

    return call


def tensorwise(rule):
    """Return a call that merges one tensor of all clients at a time."""
    return lambda updates: {n: rule([update.delta[n] for update in updates]) for n in updates[0].delta}


def contenders(shares):
    """Return name -> call; peers that are missing are left out."""
    calls = {
        "read inputs once": read_all,
        "plain weighted sum": plain_sum,
        "ours fedavg, update only": ours("fedavg", figures=False),
        "ours fedavg": ours("fedavg"),
        "ours h_ties": ours("h_ties"),
        "ours h_ties, update only": ours("h_ties", figures=False),
        "ours ties": ours("ties"),
        "ours ties, update only": ours("ties", figures=False),
        "ours median, update only": ours("median", figures=False),
        "ours krum, update only": ours("krum", figures=False),
        "ours config": ours("config"),
    }
    with contextlib.suppress(ImportError):
        merge = peft_rules().ties
        calls["peft ties"] = tensorwise(lambda tensors: merge(tensors, torch.tensor(shares), 0.2))
    with contextlib.suppress(ImportError):
        kit = mergekit_rule("ties")
        calls["mergekit ties"] = tensorwise(lambda tensors: kit(tensors, weight=shares, density=0.2))
    with contextlib.suppress(ImportError):
        calls["flower fedavg"] = flower_call("aggregate")
        calls["flower median"] = flower_call("aggregate_median")
        calls["flower krum"] = flower_call("aggregate_krum", 1, 0)
    return calls


def resident(field="VmRSS"):
    """Return this process's resident memory in bytes; ``VmHWM`` is its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak():
    """Let the peak of resident memory start afresh."""
    Path("/proc/self/clear_refs").write_text("5")


def compare(clients, size, rounds, clock):
    """Time all contenders in turns and print a table."""
    updates = make_updates(clients, size)
    total = sum(update.num_examples for update in updates)
    calls = contenders([update.num_examples / total for update in updates])
    inputs = clients * (size // TENSOR) * TENSOR * 4
    best, extra = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, 0)
    for _ in range(rounds):
        for name, call in calls.items():
            if name.startswith(("peft", "mergekit", "flower m", "flower k")) and best[name] < float("inf"):
                continue  # the slow ones run once
            before = resident()
            reset_peak()
            start = clock()
            result = call(updates)
            best[name] = min(best[name], clock() - start)
            extra[name] = max(extra[name], resident("VmHWM") - before)
            del result
    unit = best["plain weighted sum"]
    print(
        f"{clients} clients x {size / 1e6:g} M float32 in tensors of {TENSOR}, "
        f"{torch.get_num_threads()} threads, {clock.__name__}"
    )
    print(f"{'':28}{'seconds':>9}{'x plain':>9}{'x floor':>9}{'extra memory / inputs':>24}")
    for name, seconds in best.items():
        floor = seconds / best["read inputs once"]
        print(f"{name:28}{seconds:9.3f}{seconds / unit:9.1f}{floor:9.1f}{extra[name] / inputs:24.2f}")
    print_ratios(best)


def print_ratios(best):
    """Print the ratios that the targets are about."""
    wanted = [
        ("ours ties, update only", "peft ties", 8),
        ("ours ties, update only", "mergekit ties", 15),
        ("ours ties", "peft ties", None),
        ("ours ties", "mergekit ties", None),
        ("ours fedavg, update only", "flower fedavg", 3),
        ("ours fedavg", "flower fedavg", None),
        ("ours median, update only", "flower median", None),
        ("ours krum, update only", "flower krum", None),
    ]
    for mine, theirs, target in wanted:
        if theirs in best:
            goal = f" (target {target})" if target else ""
            print(f"{mine} is {best[theirs] / best[mine]:.1f} x as fast as {theirs}{goal}")
    merge, whole = (best[name] / best["plain weighted sum"] for name in ("ours h_ties, update only", "ours h_ties"))
    print(f"h_ties (Gram matrix, cuts and merge) takes {merge:.1f} plain weighted sums (target at most 12)")
    print(f"with conflict map and figures {whole:.1f}")


def stream(folder, clients, size):
    """Aggregate file-backed updates with h_ties and print time, rate and peak memory."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = 2_500_000
    paths = [folder / f"client{k}.safetensors" for k in range(clients)]
    for k, path in enumerate(paths):
        if not path.exists():
            rng = torch.Generator().manual_seed(k)
            delta = {f"layer{i:04d}": torch.randn(tensor, generator=rng) for i in range(size // tensor)}
            ClientUpdate(path.stem, delta, num_examples=k + 1).save(path)
            del delta
    updates = [ClientUpdate.load(path) for path in paths]
    read = sum(path.stat().st_size for path in paths) / 1e6
    start = time.perf_counter()
    buffer = bytearray(1 << 22)
    for path in paths:
        with path.open("rb") as file:
            while file.readinto(buffer):
                pass
    plain = time.perf_counter() - start
    reset_peak()
    start = time.perf_counter()
    result = Aggregator.by_name("h_ties")().aggregate(updates)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") / 2**30
    print(f"{clients} clients x {size / 1e6:g} M float32 from files ({read:.0f} MB), h_ties")
    print(f"plain read of the files {plain:.1f} s = {read / plain:.0f} MB/s")
    print(f"h_ties {seconds:.1f} s = {read / seconds:.0f} MB/s of input, each file read up to four times")
    print(f"peak resident memory {peak:.2f} GiB; retention {result.diagnostics['retention']}")


def main():
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--size", type=float, default=10, help="parameters per client in millions")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the fast contenders")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that is busy otherwise")
    parser.add_argument("--stream", type=Path, help="folder for file-backed updates: measure streaming instead")
    parser.add_argument("--remove", action="store_true", help="delete the folder of --stream afterwards")
    options = parser.parse_args()
    size = int(options.size * 1e6)
    if options.stream is None:
        compare(options.clients, size, options.rounds, time.process_time if options.cpu_time else time.perf_counter)
        return
    stream(options.stream, options.clients, size)
    if options.remove:
        shutil.rmtree(options.stream)


if __name__ == "__main__":
    main()

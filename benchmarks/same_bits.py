"""Whether a change of the code left every result as it was, to the bit: records hashes of many runs, and compares.

    python benchmarks/same_bits.py record before.json                at one commit
    python benchmarks/same_bits.py record after.json                 at another, on the same machine
    python benchmarks/same_bits.py compare before.json after.json    names every hash that differs
    python benchmarks/same_bits.py record some.json 'tiny:.*'        only cases whose name matches

Recorded are the adapter, the fused model, the conflict map, scores and round figures, and what ``recipes plan`` says of
bytes: all recipes on SmolLM2 at a tiny budget, and the tiny recipe in both engines, with every aggregator, regularizer
and server optimizer, and killed after a round and resumed. Runs are children of one process that has imported
everything; torch has one thread.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FEDPROXY_SCORES_MIB"] = "0"  # every case scores its own models

import torch  # after the number of threads is set
from safetensors import safe_open

from fedproxy import fit
from fedproxy.pipeline import run as _warm  # noqa: F401
from fedproxy.pipeline.plan import plan
from fedproxy.strategies.aggregators import Aggregator

ROUNDS = 3
SMOL = (
    *(
        "data.rows_per_task=6",
        "compression.calibration.rows=4",
        "evaluation.limit=2",
        "evaluation.models=[proxy,fused]",
    ),
    *("client.batch_size=4", "engine={name: in_process, threads: 1}"),
)
TINY = ("recipe=fedproxy_tiny", "data.rows_per_task=16", "client.batch_size=8", "evaluation.limit=4")
INSIDE, WORKERS = "engine={name: in_process, threads: 1}", "engine={name: workers, workers: 2}"
RECIPES = (
    *("centralised", "crash", "fedavg_proxy", "fedbiot", "fedot", "fedproxy", "fedproxy_llama", "fedproxy_plus"),
    *("fedproxy_plus_half", "local_only", "no_conflict", "no_h_ties", "no_plug_in", "offsite_tuning", "proxy_tuning"),
    *("random_blocks", "zero_shot"),
)
SMALLER = {
    "fedproxy_plus": ["healing.rows=8"],
    "fedproxy_plus_half": ["distillation.steps=2", "distillation.rows=16"],
    "fedbiot": ["realignment={name: emulator, steps: 2, rows: 8}"],
}
WITH_MEMORY = {
    "scaffold": ["regularizer={name: scaffold}", "aggregator={name: fedavg}"],
    "feddyn": [
        "regularizer={name: feddyn}",
        "server_optimizer={name: feddyn}",
        "aggregator={name: fedavg, weighting: uniform}",
    ],
    "adam": ["server_optimizer={name: adam}"],
    "sgd": ["server_optimizer={name: sgd, momentum: 0.9}"],
    "product": ["federation.space=product"],
    "realigned": [
        "trainable.blocks=last",
        "trainable.last=1",
        "aggregator={name: fedavg}",
        "realignment={name: emulator, steps: 2, rows: 8}",
    ],
    "validated": ["federation.validation={every: 1, rows: 4, select: best}", "regularizer={name: none}"],
    "sampled": ["federation.clients_per_round=2", "federation.sampling=weighted"],
}
KILLED = ("h_ties", "scaffold", "feddyn", "adam", "centered_clipping", "fedsa_lora", "flora", "fedex_lora", "none")
KILLED += ("realigned", "sampled")


def cases() -> Iterator[tuple[str, list[str], bool]]:
    """Yield every case: its name, the arguments of ``fit``, and whether it is killed after a round and resumed."""
    for recipe in RECIPES:
        rounds = 0 if recipe == "zero_shot" else 2
        yield (
            f"smol:{recipe}",
            [f"recipe={recipe}", *SMOL, f"federation.rounds={rounds}", *SMALLER.get(recipe, [])],
            False,
        )
    tiny = [*TINY, f"federation.rounds={ROUNDS}"]
    named = {name: [f"aggregator={{name: {name}}}", *_needs(name)] for name in Aggregator.names()}
    for name, options in {**named, **WITH_MEMORY}.items():
        yield f"tiny:{name}", [*tiny, INSIDE, *options], False
    for name in KILLED:
        options = {**named, **WITH_MEMORY}[name]
        yield f"workers:{name}", [*tiny, WORKERS, *options], False
        yield f"killed:{name}", [*tiny, INSIDE, *options], True
    yield "killed:workers", [*tiny, WORKERS], True


def _needs(rule: str) -> list[str]:
    """Return what a rule needs of the rest of the recipe."""
    if not Aggregator.by_name(rule).aggregates:
        return ["regularizer={name: none}"]
    if rule in ("krum", "multi_krum", "bulyan"):
        return ["data.partition={name: iid, clients: 7}", "data.rows_per_task=28"]
    return ["federation.space=product"] if Aggregator.by_name(rule).space == "product" else []


def record(pattern: str) -> dict[str, dict[str, Any]]:
    """Run every case whose name matches and return its hashes."""
    found = {}
    for name, arguments, killed in cases():
        if not re.fullmatch(pattern, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            started, out = time.monotonic(), Path(folder) / "out"
            code = _run([*arguments, f"output_dir={out}"], killed)
            found[name] = _hashes(out, arguments) if code == 0 else {"exit_code": code}
        print(f"{name:32} {time.monotonic() - started:6.1f} s  {'' if code == 0 else f'exit code {code}'}", flush=True)
    return found


def _run(arguments: list[str], killed: bool) -> int:
    if killed:
        child = _fork([*arguments, "resume=auto"])
        journal = Path(arguments[-1].removeprefix("output_dir=")) / "rounds.jsonl"
        while not journal.is_file() or not journal.read_text().count("\n"):
            if os.waitpid(child, os.WNOHANG)[0]:
                return -1  # it ended before it could be killed
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _, status = os.waitpid(_fork([*arguments, "resume=auto"]), 0)
    return os.waitstatus_to_exitcode(status)


def _fork(arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                fit.main(arguments)
                code = 0
            except Exception as error:
                errors.write(str(error))
                print(str(error)[:300], file=sys.__stderr__)
    finally:
        os._exit(code)


def _hashes(out: Path, arguments: list[str]) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text())
    rounds = [{k: v for k, v in line.items() if "seconds" not in k} for line in report["rounds"]]
    conflict = sorted(out.glob(f"checkpoints/round_{len(rounds):04d}/conflict*.safetensors"))
    return {
        "adapter": _tensors(sorted(out.glob("adapter/**/*.safetensors"))),
        "fused": _tensors(sorted(out.glob("fused/**/*.safetensors"))),
        "proxy": _tensors([out / "proxy/model.safetensors"]),
        "conflict": _tensors(conflict),
        "scores": report["scores"],
        "rounds": _sha(json.dumps(rounds, sort_keys=True)),
        "bytes": [report["cost"]["upload_bytes"], report["cost"]["download_bytes"]],
        "plan": _planned(arguments),
    }


def _tensors(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _planned(arguments: list[str]) -> str:
    sizes = re.findall(r"[\d.,]+ (?:bytes|[KMG]i?B)", str(plan(arguments)))
    return _sha(" ".join(sizes))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> int:
    """Print what differs and return how many hashes do."""
    differing = 0
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            print(f"{name}: only {'after' if old is None else 'before'}")
            differing += 1
            continue
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                print(f"{name}: {key} was {old.get(key)}, is {new.get(key)}")
                differing += 1
    print(f"{len(before.keys() & after.keys())} cases compared, {differing} hashes differ")
    return differing


def main(arguments: list[str]) -> int:
    """Record or compare."""
    match arguments:
        case ["record", file, *pattern] if len(pattern) <= 1:
            Path(file).write_text(json.dumps(record(pattern[0] if pattern else ".*"), indent=1) + "\n")
            return 0
        case ["compare", before, after]:
            return int(bool(compare(json.loads(Path(before).read_text()), json.loads(Path(after).read_text()))))
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))

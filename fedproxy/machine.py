"""What this process may use of its machine: cores, memory, processor. Nothing heavy is imported."""

import math
import os
import platform
from pathlib import Path

MOST_THREADS = 1024
"""Most threads of one operation: PyTorch crashes where the system refuses it one."""
_CGROUP = Path("/sys/fs/cgroup")

_SPINS = "1000"
"""Turns of a loop that a thread waits awake for the others, microseconds; libgomp's own are milliseconds."""


def wait_asleep() -> None:
    """Have threads of one operation wait for each other asleep; to be called before torch is imported.

    A thread that waits awake takes the core from the one that it waits for, where another process is at work: beside
    one, a step on two cores takes 7.5 times as long as alone, and 2.4 times if threads sleep. Where nothing else runs,
    waking them costs 1 to 2 %. It holds for libgomp, PyTorch's on Linux; a user's own ``OMP_WAIT_POLICY`` or
    ``GOMP_SPINCOUNT`` stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def cores() -> int:
    """Return how many cores this process may keep busy: those it is bound to, within its control group's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def _quota() -> float | None:
    """Return the cores' time that a container may use, version 2 of control groups first; None without a limit."""
    words = _text(_CGROUP / "cpu.max").split()
    if not words:
        words = [_text(_CGROUP / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        share, period = (float(word) for word in words)
    except ValueError:  # "max", or no such file
        return None
    return share / period if share > 0 and period > 0 else None


def memory_bytes() -> int | None:
    """Return the memory that this process may use at most: the machine's, within its control group's limit."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    limits = (_text(_CGROUP / name).strip() for name in ("memory.max", "memory/memory.limit_in_bytes"))
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])


def free_memory_bytes() -> int | None:
    """Return the memory that is free now, what caches give back included; None where only Linux could say it."""
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def processor() -> str:
    """Return the processor's name."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def bfloat16_units() -> bool | None:
    """Return whether the processor multiplies bfloat16 in units of its own; None where nothing says so."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

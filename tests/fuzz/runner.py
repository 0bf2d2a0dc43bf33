"""Runs one command after another in forked children of one warm process: ``python -m tests.fuzz.runner``.

Each line of standard input is a case, ``{"module", "arguments", "cwd", "log", "longest_s"}``; each line of the answer
says how it ended: exit code (None where it had to be killed), seconds, and the most memory beyond what it began with,
in bytes.
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

BUSY_MACHINE = 10
"""Wall seconds that a case is given for each second of processor time: other work may hold the processor."""
MOST_CPU_S = 15
"""Processor time after which a case is ended by the system."""
MOST_ADDRESSES = 8 << 30
"""Bytes of address space that a case may take beyond the warm process: far too many, but the machine survives it."""


def main() -> None:
    """Serve cases until standard input closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    import lightning
    import lm_eval.evaluator
    import peft
    import torch

    import fedproxy.compare
    import fedproxy.evaluation.harness
    import fedproxy.federation.server.admission
    import fedproxy.pipeline.run  # noqa: F401

    del lightning, lm_eval, peft
    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(run(**json.loads(line))) + "\n")


def run(module: str, arguments: list[str], cwd: str, log: str, longest_s: float) -> dict[str, object]:
    """Run one command in a child and return how it ended."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        _child(module, arguments, cwd, log)
    at_first = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * resource.getpagesize()
    while time.monotonic() - started < longest_s + BUSY_MACHINE * _cpu_seconds(child):
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return _ended(os.waitstatus_to_exitcode(status), started, usage, at_first)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return _ended(None, started, usage, at_first)


def _cpu_seconds(process: int) -> float:
    """Return the processor time that a child has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ended(code: int | None, started: float, usage: resource.struct_rusage, at_first: int) -> dict[str, object]:
    return {
        "code": code,
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_bytes": usage.ru_maxrss * 1024 - at_first,
    }


def _child(module: str, arguments: list[str], cwd: str, log: str) -> None:
    os.setpgid(0, 0)
    code = 1
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(cwd)
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    main()

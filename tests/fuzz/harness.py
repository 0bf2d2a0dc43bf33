"""What every case is held to, however a command's input is damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LONGEST_CPU_S = 10.0
LONGEST_S = 10.0
"""Wall seconds after which a case that computes nothing counts as hanging."""
MOST_MEMORY_BYTES = 1 << 30
NOWHERE = "http://127.0.0.1:9"
"""A proxy that nothing answers: no case may need a network."""
LONGEST_LINE = 1500
"""Most characters of an error: a few foreign texts of 300 each, and our own words."""


class Runner:
    """A warm process that runs commands in children of its own.

    Args:
        home: Folder for the caches of assets and of the hub.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environment |= {"HF_HOME": str(home / "hf"), "FEDPROXY_CACHE": str(home / "assets"), "COLUMNS": "200"}
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            text=True,
        )

    def run(self, module: str, arguments: list[str], cwd: Path, longest_s: float = LONGEST_S) -> tuple[dict, str]:
        """Run ``python -m module arguments`` in ``cwd`` and return how it ended and what it printed."""
        log = cwd.parent / f"{cwd.name}.log"
        case = {"module": module, "arguments": arguments, "cwd": str(cwd), "log": str(log), "longest_s": longest_s}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), log.read_text(errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def check(
    runner: Runner, module: str, arguments: list[str], cwd: Path, writes: str, longest_s: float = LONGEST_S
) -> None:
    """Run a command and hold it to its promises.

    Args:
        runner: Where it runs.
        module: The command.
        arguments: Its arguments.
        cwd: Where it works. Here and beside this folder nothing may change but ``writes``; caches may grow.
        writes: The run folder.
        longest_s: Wall seconds that it may wait.
    """
    before = _seen(runner, cwd, cwd / writes)
    ended, said = runner.run(module, arguments, cwd, longest_s)
    print(f"{ended['cpu_seconds']:.2f} s of CPU, {ended['seconds']:.2f} s in all, {ended['memory_bytes'] >> 20} MiB")
    print(said[-3000:])
    assert ended["code"] is not None, f"killed after {ended['seconds']:.1f} s:\n{said[-3000:]}"
    assert ended["code"] in (0, 2), f"ended with {ended['code']} after {ended['seconds']:.1f} s:\n{said[-3000:]}"
    assert "Traceback" not in said, said[-3000:]
    assert "\x1b" not in said, f"a terminal command is printed: {said[-3000:]!r}"
    if ended["code"] == 2:
        errors = [line for line in said.split("\n") if line.startswith("error: ")]
        assert len(errors) == 1, said[-3000:]
        assert said.split("\n")[-2:] == [errors[0], ""], said[-3000:]
        assert len(errors[0]) < LONGEST_LINE, errors[0][:3000]
        assert errors[0].isprintable(), repr(errors[0])
    assert ended["cpu_seconds"] < LONGEST_CPU_S, f"{ended['cpu_seconds']:.1f} s of CPU:\n{said[-1000:]}"
    assert ended["memory_bytes"] < MOST_MEMORY_BYTES, f"{ended['memory_bytes'] >> 20} MiB:\n{said[-1000:]}"
    after = _seen(runner, cwd, cwd / writes)
    changed = sorted(
        path
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path) and (path in before or not Path(path).is_relative_to(runner.home))
    )
    assert not changed, f"changed outside of the run folder: {changed}"


def _seen(runner: Runner, cwd: Path, but: Path) -> dict[str, tuple]:
    """Return what lies around the run folder, and in the caches: kind, size, time and mode of every path."""
    found = {}
    for folder in (cwd.parent, runner.home):
        for path in folder.rglob("*"):
            if not path.is_relative_to(but) and path != cwd.parent / f"{cwd.name}.log":
                status = path.lstat()
                found[str(path)] = (
                    status.st_mode,
                    status.st_size if path.is_file() else 0,
                    status.st_mtime_ns if path.is_file() else 0,
                )
    return found

"""Damaged recipes, rows, models, updates, run folders and reports: one line and exit code 2, or they work.

Every case is drawn from its kind and number, so a case that fails is the same again: `pytest -k "rows-17"`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import yaml

from fedproxy.config import load_config
from fedproxy.config.loading import to_dict
from fedproxy.data.assets import resolve
from tests.fuzz.mutations import bytes_mutated, json_mutated, tree_mutated

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
CASES = {"recipe": 110, "rows": 90, "model": 70, "update": 80, "run": 60, "report": 50}
LONGEST_CPU_S = 10.0
MOST_MEMORY_BYTES = 1 << 30
SMALL = (
    *("data.rows_per_task=4", "client.batch_size=4", "federation.rounds=1", "evaluation.limit=2"),
    *("evaluation.tasks=[tiny_colors]", "evaluation.models=[fused]", "trainer.accelerator=cpu"),
    "compression={name: uniform, keep: [0, 3], calibration: {path: asset:tiny-calibration, rows: 4, max_tokens: 16}}",
)
ONE_TASK = ("data.tasks=[tiny_colors]", "data.partition.name=iid", "data.partition.clients=2")


class Runner:
    """A warm process that runs commands in children of its own."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environment |= {"HF_HOME": str(home / "hf"), "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            text=True,
        )

    def run(self, module: str, arguments: list[str], cwd: Path) -> tuple[dict, str]:
        """Run ``python -m module arguments`` in ``cwd`` and return how it ended and what it printed."""
        log = cwd.parent / f"{cwd.name}.log"
        case = {"module": module, "arguments": arguments, "cwd": str(cwd), "log": str(log)}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), log.read_text(errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("home"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def good(tmp_path_factory, runner):
    """A folder with what every case starts from: a model, rows, and a finished run."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(resolve("asset:tiny-llama"), folder / "model")
    rows = [{"prompt": f"What follows {n}?", "target": str(n + 1), "kind": "ab"[n % 2]} for n in range(8)]
    (folder / "ward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ward.json").write_text(json.dumps(rows))
    (folder / "ward.csv").write_text("prompt,target\n" + "".join(f'"{r["prompt"]}",{r["target"]}\n' for r in rows))
    (folder / "ward.txt").write_text("".join(f"{row['prompt']} {row['target']}\n" for row in rows))
    ended, said = runner.run(
        "fedproxy.fit",
        ["recipe=fedproxy_tiny", *SMALL, *ONE_TASK, "evaluation.models=[target,fused]", "output_dir=run"],
        folder,
    )
    assert ended["code"] == 0, said
    return folder


def snapshot(folder: Path, but: Path) -> dict[str, tuple]:
    """Return what lies in a folder, outside of ``but``: kind, size, time and mode of every path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_relative_to(but):
            status = path.lstat()
            found[str(path)] = (
                status.st_mode,
                status.st_size if path.is_file() else 0,
                status.st_mtime_ns if path.is_file() else 0,
            )
    return found


def check(runner: Runner, module: str, arguments: list[str], cwd: Path, writes: str) -> None:
    """Run a command and hold it to its promises; it may change ``writes`` inside of ``cwd`` and nothing else."""
    before = snapshot(cwd, cwd / writes)
    ended, said = runner.run(module, arguments, cwd)
    assert ended["code"] in (0, 2), f"ended with {ended['code']} after {ended['seconds']:.1f} s:\n{said[-3000:]}"
    assert "Traceback" not in said, said[-3000:]
    if ended["code"] == 2:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said[-3000:]
        assert len(errors[0]) < 1500, errors[0][:3000]
        assert errors[0].isprintable(), repr(errors[0])
    assert ended["cpu_seconds"] < LONGEST_CPU_S, said[-1000:]
    assert ended["memory_bytes"] < MOST_MEMORY_BYTES
    assert snapshot(cwd, cwd / writes) == before, "something outside of the run folder changed"


def cases(kind: str) -> list:
    return [pytest.param(Random(f"{kind}-{n}"), id=f"{kind}-{n}") for n in range(CASES[kind])]


@pytest.fixture
def place(tmp_path, good):
    """A folder to work in, with somebody's notes beside what a case makes."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    (place / "other" / "deep").mkdir(parents=True)
    (place / "other" / "deep" / "config.yaml").write_text("a: 1\n")
    return place


@pytest.mark.parametrize("random", cases("recipe"))
def test_recipes(random, runner, place):
    recipe = to_dict(load_config(["recipe=fedproxy_tiny", *SMALL, *ONE_TASK]))
    del recipe["output_dir"]
    text = yaml.safe_dump(tree_mutated(recipe, random, random.choice((1, 1, 2, 4))), allow_unicode=True)
    data = bytes_mutated(text.encode(), random) if random.random() < 0.2 else text.encode()
    (place / "mine.yaml").write_bytes(data)
    module = random.choice(["fedproxy.fit"] * 3 + ["fedproxy.compress"])
    check(runner, module, ["recipe=mine.yaml", "output_dir=run"], place, "run")


@pytest.mark.parametrize("random", cases("rows"))
def test_rows(random, runner, place, good):
    name = random.choice(["ward.jsonl"] * 3 + ["ward.json", "ward.csv", "ward.txt"])
    data = (good / name).read_bytes()
    (place / name).write_bytes((json_mutated if "json" in name else bytes_mutated)(data, random))
    what = [f"data.files.ward={name}", "data.tasks=[]"]
    if name == "ward.txt" or random.random() < 0.2:
        calibration = f"{{path: {name}, rows: 4, max_tokens: 16}}"
        what = [f"compression={{name: block_influence, ratio: 0.5, calibration: {calibration}}}", *ONE_TASK]
    check(runner, "fedproxy.fit", ["recipe=fedproxy_tiny", *SMALL, *what, "output_dir=run"], place, "run")


@pytest.mark.parametrize("random", cases("model"))
def test_models(random, runner, place, good):
    shutil.copytree(good / "model", place / "model")
    files = sorted(path for path in (place / "model").iterdir() if path.is_file())
    path = random.choice(files)
    if random.random() < 0.1:
        path.unlink()
    else:
        mutate = json_mutated if path.suffix == ".json" else bytes_mutated
        path.write_bytes(mutate(path.read_bytes(), random))
    if random.random() < 0.7:
        arguments = ["recipe=fedproxy_tiny", *SMALL, *ONE_TASK, "target.path=model", "output_dir=run"]
        check(runner, "fedproxy.fit", arguments, place, "run")
    else:
        arguments = ["model=model", "tasks=[tiny_colors]", "limit=2", "output_dir=run"]
        check(runner, "fedproxy.evaluate", arguments, place, "run")


@pytest.mark.parametrize("random", cases("run"))
def test_run_folders(random, runner, place, good):
    shutil.copytree(good / "run", place / "run", symlinks=True)
    files = sorted(path for path in (place / "run").rglob("*") if path.is_file() and path.suffix != ".html")
    for path in random.sample(files, random.choice((1, 1, 2))):
        match random.randrange(5):
            case 0:
                path.unlink()
            case 1:
                path.unlink()
                random.choice((os.mkfifo, os.mkdir))(path)
            case _:
                mutate = json_mutated if path.suffix in (".json", ".jsonl") else bytes_mutated
                path.write_bytes(mutate(path.read_bytes(), random))
    arguments = ["recipe=fedproxy_tiny", *SMALL, *ONE_TASK, "evaluation.models=[target,fused]", "resume=auto"]
    arguments += [f"federation.rounds={random.choice((1, 2))}", "output_dir=run"]
    check(runner, "fedproxy.fit", arguments, place, "run")


@pytest.mark.parametrize("random", cases("report"))
def test_reports(random, runner, place, good):
    for name in ("a", "b"):
        (place / "run" / name).mkdir(parents=True)
        for path in (good / "run").glob("*.json*"):
            shutil.copy(path, place / "run" / name)
        shutil.copytree(good / "run" / "evaluation", place / "run" / name / "evaluation")
    files = sorted(path for path in (place / "run" / "b").rglob("*") if path.suffix in (".json", ".jsonl"))
    path = random.choice([place / "run" / "b" / "report.json"] * len(files) + files)
    path.write_bytes(json_mutated(path.read_bytes(), random))
    arguments = random.choice((["run/b"], ["run/a", "run/b"], ["run/b", "run/a"]))
    check(runner, "fedproxy.report", arguments, place, "run")

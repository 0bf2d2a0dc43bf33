"""Dependencies point one way, and commands stay light until they work."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedproxy"
FOUNDATION = ("errors", "registry", "protocol", "processes", "seeding", "files", "names", "tensor_files", "task_means")
STRATEGIES = (*FOUNDATION, "models", "strategies", "modules", "data")
ALLOWED = {
    "strategies/aggregators": (*FOUNDATION, "strategies.aggregators", "strategies.functional"),
    "strategies": STRATEGIES,
    "modules": STRATEGIES,
    "models": (*FOUNDATION, "models"),
    "data": (*FOUNDATION, "data", "models"),
    "federation": (*STRATEGIES, "federation"),
    "evaluation": (*STRATEGIES, "evaluation"),
    "reporting": (*FOUNDATION, "reporting"),
    "config": (*STRATEGIES, "federation", "config", "recipe_files"),
    "pipeline": (*STRATEGIES, "federation", "evaluation", "reporting", "config", "pipeline"),
    "comparison": ("errors", "files", "names", "reporting", "config", "pipeline", "comparison"),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports_only_what_lies_below_it(layer):
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / layer).rglob("*.py")
        for name in imported(path)
        if name.startswith("fedproxy.")
        and not any(name.removeprefix("fedproxy.").startswith(allowed) for allowed in ALLOWED[layer])
    ]
    assert not wrong


def test_aggregators_need_torch_alone():
    heavy = {"transformers", "lightning", "peft", "datasets", "lm_eval", "omegaconf"}
    files = [*(PACKAGE / "strategies/aggregators").rglob("*.py"), *(PACKAGE / "strategies/functional").rglob("*.py")]
    assert files
    assert not [f"{p}: {n}" for p in files for n in imported(p) if n.split(".")[0] in heavy]


def test_lm_eval_is_imported_by_the_evaluation_package_alone():
    users = [p for p in PACKAGE.rglob("*.py") if any(name.split(".")[0] == "lm_eval" for name in imported(p))]
    assert users
    assert {p.parent.name for p in users} == {"evaluation"}


def test_no_file_is_longer_than_400_lines():
    assert not [str(p) for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 400]


def test_nothing_loads_remote_code_or_pickles():
    sources = "".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    assert "trust_remote_code" not in sources
    assert "import pickle" not in sources
    assert "torch.load" not in sources


@pytest.mark.parametrize("command", ["fit", "compare", "compress", "assets", "recipes", "evaluate", "report"])
def test_help_answers_at_once_with_examples(command):
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"fedproxy.{command}", "--help"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert f"python -m fedproxy.{command}" in done.stdout
    assert " torch\n" not in done.stderr  # not a timed test: what would make it slow is not imported
    assert seconds < 10

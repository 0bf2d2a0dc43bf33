"""Files stay short, models are read in one place, and commands stay light; who imports whom is import-linter's."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedproxy"
LONGEST_FUNCTION = 60


def test_no_file_is_longer_than_400_lines():
    assert not [str(p) for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 400]


def test_no_function_is_longer_than_60_lines():
    functions = (
        (path, node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert not [
        f"{path.name}: {node.name}" for path, node in functions if node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]


LOADERS = {"models/loading.py", "data/loading.py"}
READS = {"from_pretrained", "from_config", "load_dataset", "load_from_disk"}
UNPICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def foreign_reads(path):
    """Yield the calls and imports by which a library would read a model, a data set or a pickle."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            from_memory = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value is None
            if name in READS and not from_memory:  # from_pretrained(None, ...) builds from what is given
                yield name
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in {
                "torch.load",
                "numpy.load",
                "np.load",
            }:
                yield ast.unparse(node.func)
            yield from (
                f"{key.arg}={ast.unparse(key.value)}"
                for key in node.keywords
                if (key.arg, ast.unparse(key.value)) in {("trust_remote_code", "True"), ("weights_only", "False")}
            )
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in UNPICKLES)


def test_models_and_data_are_read_by_the_loaders_alone_and_nothing_is_unpickled():
    found = {str(p.relative_to(PACKAGE)): set(foreign_reads(p)) for p in PACKAGE.rglob("*.py")}
    assert {path for path, reads in found.items() if reads} == LOADERS
    assert found["models/loading.py"] == {"from_pretrained", "from_config"}
    assert found["data/loading.py"] == {"load_dataset"}


@pytest.mark.parametrize(
    "line",
    [
        "AutoModel.from_pretrained(path)", "load_dataset('x')", "torch.load(path)", "import pickle",
        "from joblib import load", "f(trust_remote_code=True)", "torch.serialization.x(weights_only=False)",
    ],
)  # fmt: skip
def test_another_loader_is_found(line, tmp_path):
    (tmp_path / "module.py").write_text(line)
    assert list(foreign_reads(tmp_path / "module.py"))


def test_every_read_of_a_model_is_told_not_to_run_its_code():
    tree = ast.parse((PACKAGE / "models/loading.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") in READS]
    assert len(calls) >= 5
    for call in calls:
        given = {f"{key.arg}={ast.unparse(key.value)}" for key in call.keywords}
        assert any(word.startswith(("trust_remote_code=False", "None=_source(")) for word in given), ast.unparse(call)


COMMANDS = ("fit", "compare", "compress", "assets", "recipes", "evaluate", "report", "site", "hub")


@pytest.mark.parametrize("command", COMMANDS)
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

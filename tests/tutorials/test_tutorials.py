"""Every tutorial runs from its first block to its last in an empty folder, on the tiny recipe with small budgets."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedproxy.command import COMMANDS
from fedproxy.sites.demo import free_port

PAGES = Path(__file__).parent.parent.parent / "docs" / "tutorials"
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
TINY = {
    "recipe=fedproxy_llama": "recipe=fedproxy_tiny federation.rounds=2",
    "cp fedproxy_llama": "cp fedproxy_tiny",
    "recipes=[fedproxy_llama,": "recipes=[fedproxy_tiny,",
    "reference=fedproxy_llama": "reference=fedproxy_tiny",
    "extends: fedproxy_llama": "extends: fedproxy_tiny",
    "data.rows_per_task=64": "data.rows_per_task=16",
    "evaluation.limit=50": "evaluation.limit=4",
    "range(200)": "range(40)",
    "compression.ratio=0.14": "compression.ratio=0.34",
    "least_rows: 100": "least_rows: 20",
    "fedproxy doctor": "fedproxy --version",  # plans the recipes of large models, which has tests of its own
}


def blocks(name):
    """Return (language, text) of a page's blocks, in order, made small."""
    found = BLOCK.findall((PAGES / f"{name}.md").read_text())
    return [(language, small(text)) for language, text in found]


def small(text):
    for words, instead in TINY.items():
        text = text.replace(words, instead)
    return text


def lines(text):
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("name", sorted(path.stem for path in PAGES.glob("*.md")))
def test_pages_name_commands_and_pages_that_exist(name):
    text = (PAGES / f"{name}.md").read_text()
    named = {words[1] for language, block in BLOCK.findall(text) if language == "bash" for words in commands(block)}
    assert named or name == "python"  # which is of the functions behind the commands
    assert named <= set(COMMANDS)
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert (PAGES / link).is_file(), link
    assert f"(tutorials/{name}.md)" in (PAGES.parent / "index.md").read_text()


def commands(block):
    return [words for words in lines(block) if words[:1] == ["fedproxy"]]


@pytest.mark.parametrize("name", ["your_model_and_data", "write_an_aggregator"])
def test_a_tutorial_runs_in_order(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)  # of another page
    variables = {"__name__": "tutorial"}
    for language, text in blocks(name):
        if language == "python":
            if saved := re.match(r"# (\w+\.py)\n", text):
                Path(saved[1]).write_text(text)
            else:
                exec(compile(text, name, "exec"), variables)
            continue
        assert {words[0] for words in lines(text)} <= {"fedproxy", "pip"}
        for words in commands(text):
            if words[1] in COMMANDS:
                importlib.import_module(f"fedproxy.{words[1]}").main(words[2:])
    said = capsys.readouterr().out
    if name == "write_an_aggregator":
        assert "tensor([2., 0., 2.])\ntensor([2., 1., 2.])\n" in said
        assert "    tensor([2., 0., 2.])\n    tensor([2., 1., 2.])\n" in (PAGES / f"{name}.md").read_text()
        assert Path("runs/compared/comparison.html").is_file()
    else:
        assert re.search(r"^fused +answer NLL +[\d.]+ +exact answers +[\d.]+%$", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.flower
def test_two_sites_run_in_one_shell(tmp_path):
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    pytest.importorskip("flwr", reason="pip install 'fedproxy[flower]'")
    ports = {port: str(free_port()) for port in ("8443", "9094", "9095")}
    script = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    script.append(f'fedproxy() {{ {sys.executable} -m fedproxy "$@"; }}')
    for language, text in blocks("two_sites"):
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("pip ", "kill ")))
        script.append(text if language == "bash" else f"{sys.executable} - <<'PYTHON'\n{text}PYTHON")
    words = "\n".join(script).replace("hosts=[localhost]", f"hosts=[localhost] port=8443 superlink_port={free_port()}")
    for port, instead in ports.items():
        words = words.replace(port, instead)
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=570,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "runs/two_sites/report.md" in done.stdout
    assert "answer_nll" in (tmp_path / "runs/two_sites/report.json").read_text()
    assert '"train"' in done.stdout  # of the journal

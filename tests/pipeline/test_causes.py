"""What went wrong is one line, and with FEDPROXY_DEBUG=1 its whole traceback: in real processes, as users see it."""

import os
import subprocess
import sys

import pytest

PLUGIN = """
from dataclasses import dataclass

from fedproxy.strategies.regularizers import Regularizer


@dataclass(frozen=True)
class Odd(Regularizer, name="odd"):
    def loss(self, params, anchor, conflict, pull=None):
        return self.deeper(sorted(params))

    def deeper(self, names):
        raise LookupError("no such \\x1b[31mthing")
"""
HINT = "(FEDPROXY_DEBUG=1 shows the traceback)"
SMALL = (
    "recipe=fedproxy_tiny", "data.tasks=[tiny_sums,tiny_places]", "data.rows_per_task=8", "federation.rounds=1",
    "evaluation.models=[]",
)  # fmt: skip


def command(folder, name, *words, debug):
    """Run a command of the package and return its exit code and what it wrote to standard error."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("FEDPROXY_DEBUG", None)
    done = subprocess.run(
        [sys.executable, "-m", f"fedproxy.{name}", *words],
        env=environment | ({"FEDPROXY_DEBUG": debug} if debug else {}),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "odd_rule.py").write_text(PLUGIN)
    return ["plugins=[odd_rule]", "regularizer={name: odd}", f"output_dir={tmp_path / 'run'}"]


def test_a_plugin_that_fails_on_a_client_is_one_line(tmp_path, plugin):
    code, said = command(tmp_path, "fit", *SMALL, *plugin, "engine={name: in_process, threads: 1}", debug=None)
    assert code == 2
    assert "Traceback" not in said
    assert said.rstrip().endswith(HINT)
    assert said.splitlines()[-1].startswith("error: ")
    dropped = [line for line in said.splitlines() if "is dropped: LookupError; details in the client's log" in line]
    assert dropped
    assert all(line.endswith(HINT) for line in dropped)


@pytest.mark.parametrize("engine", ["{name: in_process, threads: 1}", "{name: workers, workers: 1}"])
def test_a_plugin_that_fails_on_a_client_is_shown_whole_on_demand(tmp_path, plugin, engine):
    code, said = command(tmp_path, "fit", *SMALL, *plugin, f"engine={engine}", debug="1")
    assert code == 2
    assert "in deeper" in said  # the plugin's own line, from the client's log
    assert "LookupError: no such thing" in said  # without the colour
    assert "\x1b" not in said
    assert "ClientError: " in said
    assert HINT not in said


def test_a_plugin_that_cannot_be_imported_names_its_cause_on_demand(tmp_path):
    (tmp_path / "odd_rule.py").write_text("def make():\n    return 1 / 0\n\n\nmake()\n")
    words = ("recipe=fedproxy_tiny", "plugins=[odd_rule]", f"output_dir={tmp_path / 'run'}")
    code, said = command(tmp_path, "compress", *words, debug="0")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("error: plugins: 'odd_rule' fails while it is imported (ZeroDivisionError")
    assert said.endswith(f"{HINT}\n")
    code, said = command(tmp_path, "compress", *words, debug="1")
    assert code == 2
    assert said.startswith("error: plugins: ")
    assert "return 1 / 0" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compare", ["recipes=[no_such]"]),
        ("evaluate", ["model=x"]),
        ("report", ["/no/such/run"]),
    ],
)
def test_every_command_is_one_line_and_shows_where_on_demand(tmp_path, name, words):
    code, said = command(tmp_path, name, *words, debug=None)
    assert (code, said.count("\n")) == (2, 1)
    assert HINT not in said  # the line says it all
    code, more = command(tmp_path, name, *words, debug="1")
    assert code == 2
    assert more.startswith(said)
    assert "Traceback (most recent call last):" in more

"""An error's line is short and printable, whatever was put into it."""

import subprocess
import sys

import pytest

from fedproxy.errors import LONGEST_LINE, LONGEST_MESSAGE, ConfigError, message_of


def test_a_long_value_is_cut_in_its_middle():
    line = message_of(ConfigError(f"evaluation.models: unknown model '{'x' * 10_000}'; did you mean 'fused'?"))
    assert line.startswith("evaluation.models: unknown model 'xxx")
    assert line.endswith("xxx'; did you mean 'fused'?")
    assert len(line) < LONGEST_LINE + 80


def test_a_long_line_keeps_its_key_and_its_way_out():
    line = message_of(ConfigError(f"client.lr: {'a b ' * 5000}; correct it"))
    assert line.startswith("client.lr: a b")
    assert line.endswith("; correct it")
    assert len(line) <= LONGEST_MESSAGE


def test_a_file_is_named_whole():
    path = "/data/" + "/".join(["a_long_name"] * 20) + "/rows.jsonl"
    assert message_of(ConfigError(f"{path}, line 3: no prompt")) == f"{path}, line 3: no prompt"


@pytest.mark.parametrize("word", ["evaluation.models=[X]", "loggers=[X]", "accept_changed=[X]", "data.formats={a: X}"])
def test_names_that_do_not_exist_are_shown_in_short(word):
    done = subprocess.run(
        [sys.executable, "-m", "fedproxy.fit", "recipe=fedproxy_tiny", word.replace("X", "x" * 5000 + "\\e[31m")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < LONGEST_MESSAGE
    assert "\x1b" not in done.stderr

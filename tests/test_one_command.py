"""`fedproxy COMMAND`, and what doctor says."""

import os
import re
import subprocess
import sys

import pytest

import fedproxy
from fedproxy import doctor
from fedproxy.__main__ import COMMANDS
from fedproxy.errors import ConfigError


def said(*words, **environment):
    """Exit code, standard output and standard error of one command."""
    done = subprocess.run(
        [sys.executable, "-m", "fedproxy", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_names_every_command():
    code, out, _ = said("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert said("--version")[:2] == (0, f"fedproxy {fedproxy.__version__}\n")
    assert said()[0] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    code, out, error = said(name, "--help")
    assert (code, error) == (0, "")
    assert f"fedproxy.{name}" in out


def test_what_is_no_command_is_one_line():
    assert said("fti") == (2, "", "error: 'fti' is not a command; did you mean 'fit'?\n")
    code, _, error = said("fit", "recipe=fedproxy_tny")
    assert code == 2
    assert error.startswith("error: recipe=fedproxy_tny")
    assert error.count("\n") == 1


def test_doctor_names_what_is_here_and_fetches_nothing(tmp_path):
    code, out, _ = said("doctor", FEDPROXY_CACHE=str(tmp_path / "empty"))
    assert code == 0
    lines = {line[:38].strip(): line[39:] for line in out.splitlines()}
    assert {line[38] for line in out.splitlines()} == {" "}  # the longest name too is apart from what is said of it
    assert lines["fedproxy"].startswith(fedproxy.__version__)
    assert lines["fedproxy_tiny"].endswith("; fits")
    assert "fedproxy.assets fetch smollm2-135m" in lines["fedproxy_llama"]
    assert re.search(r"takes up to 1[3-6]\.\d GiB", lines["paper/fedproxy_llama2_7b_heterogeneous"])
    assert not (tmp_path / "empty" / "wheels").exists()


def test_doctor_takes_no_words():
    with pytest.raises(ConfigError, match="doctor takes no arguments, got 'x'; leave it out"):
        doctor.main(["x"])

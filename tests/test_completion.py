"""What the Tab key gives, as a function and in the shells themselves."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from fedproxy.command import COMMANDS
from fedproxy.completion import _SCRIPTS, _VERBS, candidates, main
from fedproxy.config import RunConfig
from fedproxy.config.key_words import _leaves
from fedproxy.errors import ConfigError
from fedproxy.recipe_files import recipe_names


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["fi"], ["fit"]),
        (["recipes", "pl"], ["plan"]),
        (["recipes", "show", "paper/fedproxy_llama2_7b_het"], ["paper/fedproxy_llama2_7b_heterogeneous"]),
        (["fit", "recipe=fedproxy_ll"], ["recipe=fedproxy_llama"]),
        (["fit", "recipe=fedproxy_tiny", "agg"], ["aggregator."]),
        (["fit", "aggregator.name=h_t"], ["aggregator.name=h_ties"]),
        (["fit", "aggregator.name=krum", "aggregator.f"], []),
        (["fit", "resume="], ["resume=auto", "resume=never"]),
        (["fit", "target.dtype=b"], ["target.dtype=bfloat16"]),
        (["fit", "overwrite="], ["overwrite=false", "overwrite=true"]),
        (["fit", "client.lr=1"], []),
        (["fit", "parts.precision.u"], ["parts.precision.up="]),
        (["recipes", "plan", "fedproxy_tiny", "federation.r"], ["federation.round_timeout_s=", "federation.rounds="]),
        (["compare", "recipes=[fedot,centr"], ["recipes=[fedot,centralised"]),
        (["compare", "study=prec"], ["study=precision_and_ranks"]),
        (["evaluate", "num_"], ["num_fewshot="]),
        (["assets", "fetch", "qa", "tiny-ll"], ["tiny-llama"]),
        (["report", "runs/"], []),
        (["nonsense", ""], []),
    ],
)
def test_a_word_becomes_what_the_command_takes(line, found):
    assert candidates(line) == found


def test_nothing_typed_gives_all_that_may_follow():
    assert candidates([]) == candidates([""]) == sorted(COMMANDS)
    assert candidates(["fit", "recipe="]) == [f"recipe={name}" for name in recipe_names()]
    assert candidates(["compare", "recipes="]) == [f"recipes=[{name}" for name in recipe_names()]
    assert {"recipe=", "client.", "seed="} <= set(candidates(["fit", ""]))


def test_a_class_that_is_named_has_its_own_options_alone():
    assert "aggregator.density=" in candidates(["fit", "aggregator."])
    assert "aggregator.density=" in candidates(["fit", "aggregator.name=ties", "aggregator."])
    assert "aggregator.density=" not in candidates(["fit", "aggregator.name=fedavg", "aggregator."])


def test_keys_are_those_of_the_real_classes():
    from fedproxy.config.source import configuration_class

    assert dict(_leaves(configuration_class(), "", {})) == dict(_leaves(RunConfig, "", {}))


@pytest.mark.parametrize("command", _VERBS)
def test_verbs_are_those_that_a_command_explains(command, capsys):
    if command == "assets":
        with pytest.raises(SystemExit):
            importlib.import_module("fedproxy.assets").main(["--help"])
        told = re.findall(r"^    (\w+) +\w", capsys.readouterr().out, re.MULTILINE)
    else:
        usage = importlib.import_module(f"fedproxy.{command}").USAGE
        line = usage.strip().partition("\n\n")[0]
        told = re.findall(rf"(?:fedproxy\.{command}|\|) (\w+)", line)
    assert sorted(set(told)) == sorted(_VERBS[command])


def test_what_is_no_shell_is_one_line():
    with pytest.raises(ConfigError, match="completion takes the name of a shell, got 'bsh'; did you mean 'bash'"):
        main(["bsh"])


DRIVERS = {
    "bash": r"""
source {script}
complete_line() {{
    COMP_LINE=$1 COMP_POINT=${{#1}}
    compopt() {{ :; }}
    _fedproxy
    printf '%s\n' "${{COMPREPLY[@]}}"
}}
complete_line "{line}"
""",
    "fish": 'source {script}\ncomplete -C "{line}"\n',
    # zsh's own builtins work in its line editor alone.
    "zsh": r"""
compdef() {{ : }}
compadd() {{
    shift ${{argv[(i)--]}}
    print -rl -- $@
}}
source {script}
words=({line})
CURRENT=$#words
_fedproxy
""",
}


@pytest.mark.parametrize("shell", _SCRIPTS)
@pytest.mark.parametrize(
    ("line", "found", "kept_by_bash"),
    [
        ("fedproxy compl", "completion", "completion"),
        ("fedproxy recipes show fedproxy_ll", "fedproxy_llama", "fedproxy_llama"),
        ("fedproxy fit recipe=fedproxy_ll", "recipe=fedproxy_llama", "fedproxy_llama"),
        ("fedproxy fit recipe=fedproxy_tiny reali", "realignment.", "realignment."),
    ],
)
def test_shells_complete(shell, line, found, kept_by_bash, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "bin" / "fedproxy"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fedproxy "$@"\n')
    command.chmod(0o755)
    script = tmp_path / f"script.{shell}"
    script.write_text(_SCRIPTS[shell])
    driver = tmp_path / f"driver.{shell}"
    driver.write_text(DRIVERS[shell].format(script=script, line=line))
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [shell, *flags, driver], capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path}
    )
    wanted = kept_by_bash if shell == "bash" else found
    assert [row.split("\t")[0] for row in done.stdout.splitlines() if row] == [wanted], done.stderr

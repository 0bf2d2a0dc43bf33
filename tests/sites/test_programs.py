"""Programs that a hub or a site keeps: ended whole whoever dies first, started again, with the reason in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedproxy.errors import ConfigError
from fedproxy.sites import hub_commands, site_commands
from fedproxy.sites.arguments import options, worded
from fedproxy.sites.front_door import nginx_command, write_front_door
from fedproxy.sites.hub_config import HubPlace
from fedproxy.sites.programs import Program
from fedproxy.wire.flower import Flower

from .fake_courier import waited

TREE = """
import os, subprocess, sys, time
inner = "import os,sys,time; open(sys.argv[1],'a').write(f'{os.getpid()} '); time.sleep(600)"
for new in (False, True):  # one of them leaves the session, as Flower's do
    subprocess.Popen([sys.executable, "-c", inner, sys.argv[1]], start_new_session=new)
open(sys.argv[1] + "_root", "w").write(f"{os.getpid()}")
open(sys.argv[1], "a").write(f"{os.getpid()} ")
time.sleep(600)
"""
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def tree(tmp_path):
    pids = tmp_path / "pids"
    program = Program("tree", [sys.executable, "-c", TREE, str(pids)], dict(os.environ), tmp_path / "log")
    program.start()
    waited(lambda: pids.exists() and len(pids.read_text().split()) == 3)
    return program, [int(pid) for pid in pids.read_text().split()]


def test_a_program_is_ended_with_all_that_it_started(tmp_path):
    program, pids = tree(tmp_path)
    program.end()
    waited(lambda: not any(map(alive, pids)))


def test_what_a_killed_program_leaves_is_ended(tmp_path):
    program, pids = tree(tmp_path)
    os.kill(int((tmp_path / "pids_root").read_text()), signal.SIGKILL)
    waited(lambda: not any(map(alive, pids)), 20)
    waited(lambda: not program.runs)
    assert "tree ended (exit status 9" in program.look()


def test_nothing_is_left_when_who_keeps_it_is_killed(tmp_path):
    code = (
        "import os,sys,time; from pathlib import Path; from fedproxy.sites.programs import Program\n"
        f"Program('t', [sys.executable, '-c', {TREE!r}, {str(tmp_path / 'pids')!r}], dict(os.environ), "
        f"Path({str(tmp_path / 'log')!r})).start(); time.sleep(600)"
    )
    keeper = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pids = tmp_path / "pids"
    waited(lambda: pids.exists() and len(pids.read_text().split()) == 3, 60)
    keeper.send_signal(signal.SIGKILL)
    keeper.wait()
    waited(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), 20)


def test_a_program_that_ends_is_started_again_after_a_while_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.sites.programs.AGAIN_S", 0.3)
    program = Program(
        "node", [sys.executable, "-c", "print('Exit Code: 305')"], dict(os.environ), tmp_path / "log",
        reasons={site_commands.REFUSED: "the hub does not let it in"},
    )  # fmt: skip
    program.start()
    waited(lambda: not program.runs)
    assert program.look() == "node ended (the hub does not let it in); it is started again in 0.3 s"
    assert program.look() is None
    time.sleep(0.4)
    program.look()
    assert program.starts == 2
    program.end()


def test_flowers_environment_holds_no_secrets_and_asks_nobody(tmp_path, monkeypatch):
    (tmp_path / "flwr").write_text("#!/bin/sh\n")
    (tmp_path / "flwr").chmod(0o755)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("HTTPS_PROXY", "http://x")
    made = Flower(tmp_path / "home", str(tmp_path)).environment(ONE="1")
    assert made["FLWR_TELEMETRY_ENABLED"] == "0"
    assert made["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert made["ONE"] == "1"
    assert not {"AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "PYTHONPATH"} & made.keys()
    with pytest.raises(ConfigError, match="flower-superlink is not in"):
        Flower(tmp_path, str(tmp_path)).command("flower-superlink")


def hub(tmp_path, text="hosts: [hub.example]\n"):
    (tmp_path / "hub.yaml").write_text(text)
    return HubPlace.read(tmp_path / "hub.yaml")


def test_the_front_door_passes_the_sites_paths_on_and_nothing_else(tmp_path):
    text = write_front_door(hub(tmp_path)).read_text()
    passed = [line.split()[1] if line.split()[1] != "=" else line.split()[2] for line in text.splitlines()
              if "proxy_pass" in line]  # fmt: skip
    assert passed == ["/v1/fleet/", "/health"]
    assert "location / { return 404; }" in text
    assert "client_max_body_size 8m" in text
    assert "proxy_pass http:" not in text
    caddy = (tmp_path / "hub/front_door/Caddyfile").read_text()
    assert "@sites path /v1/fleet/* /health" in caddy
    assert caddy.rstrip().endswith("respond 404\n}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("hosts: []\n", "hosts must be names or addresses"),
        ("hosts: ['a b']\n", "hosts must be names or addresses"),
        ("hosts: [a]\nlisten: '0.0.0.0; x'\n", "listen must be an address"),
        ("hosts: [a]\nport: 0\n", "port must be from 1 to 65535"),
        ("hosts: [a]\nport: 9093\n", "superlink_port must differ from port"),
        ("hosts: [a]\nfront_door: caddy\n", "front_door must be one of nginx, external"),
        ("port: 1\n", "hosts is missing"),
    ],
)
def test_a_hub_file_that_cannot_be_meant_is_refused_with_its_key(text, line, tmp_path):
    with pytest.raises(ConfigError, match=f"hub file .*hub.yaml: {line}"):
        hub(tmp_path, text)


def test_a_machine_without_nginx_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="apt-get install nginx-light"):
        nginx_command(hub(tmp_path))


def test_a_site_is_registered_by_its_own_key_and_name_once(tmp_path):
    pytest.importorskip("cryptography", reason="keys come with fedproxy[flower]")
    said = []
    hub_commands.init(tmp_path / "hub.yaml", hosts=["localhost"], port=1, superlink_port=2, say=said.append)
    for name in ("a", "b"):
        site_commands.init(tmp_path / f"{name}.yaml", name=name, address="localhost:1", node_port=3, say=said.append)
    hub_commands.register(tmp_path / "hub.yaml", "a", tmp_path / "a/keys/site.pub", say=said.append)
    assert "will be registered when the hub comes up" in said[-1]
    with pytest.raises(ConfigError, match="is the key of another site already"):
        hub_commands.register(tmp_path / "hub.yaml", "b", tmp_path / "a/keys/site.pub", say=said.append)
    with pytest.raises(ConfigError, match="site 'a' has another key already"):
        hub_commands.register(tmp_path / "hub.yaml", "a", tmp_path / "b/keys/site.pub", say=said.append)
    key = (tmp_path / "hub/keys/ca.key").read_bytes()
    hub_commands.init(tmp_path / "hub.yaml", hosts=["localhost"], port=1, superlink_port=2, say=said.append)
    assert (tmp_path / "hub/keys/ca.key").read_bytes() == key


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "nothing is nothing that it does"),
        (["upp", "hub.yaml"], "did you mean 'up'"),
        (["up"], "needs a .yaml file"),
        (["up", "port=3"], "needs a .yaml file"),
    ],
)
def test_words_that_say_nothing_are_one_line_with_an_example(words, line):
    with pytest.raises(ConfigError, match=line):
        worded(words, "hub", ("init", "up"))


def test_options_are_typed_and_unknown_ones_named():
    assert options(["port=3", "hosts=[a,b]"], {"port": int, "hosts": list}) == {"port": 3, "hosts": ["a", "b"]}
    assert options(["hosts=a"], {"hosts": list}) == {"hosts": ["a"]}
    with pytest.raises(ConfigError, match="port must be a whole number"):
        options(["port=x"], {"port": int})
    with pytest.raises(ConfigError, match="did you mean 'port'"):
        options(["prot=3"], {"port": int})

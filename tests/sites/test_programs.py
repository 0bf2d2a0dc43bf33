"""Programs that a hub or a site keeps: ended whole whoever dies first, started again, with the reason in one line."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedproxy.errors import ConfigError
from fedproxy.sites import hub_commands, site_commands
from fedproxy.sites.arguments import options, worded
from fedproxy.sites.front_door import nginx_command, write_front_door
from fedproxy.sites.hub_commands import HubInit
from fedproxy.sites.hub_config import HubPlace
from fedproxy.sites.probe import freed
from fedproxy.sites.programs import Program
from fedproxy.sites.site_commands import SiteInit
from fedproxy.sites.site_config import SitePlace
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
        reasons={"Exit Code: 305": "the hub does not let it in"},
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
    hub_commands.init(tmp_path / "hub.yaml", HubInit(["localhost"], 1, 2), say=said.append)
    for name in ("a", "b"):
        site_commands.init(tmp_path / f"{name}.yaml", SiteInit(name, "localhost:1", 3), say=said.append)
    hub_commands.register(tmp_path / "hub.yaml", "a", tmp_path / "a/keys/site.pub", say=said.append)
    assert "will be registered when the hub comes up" in said[-1]
    with pytest.raises(ConfigError, match="is the key of another site already"):
        hub_commands.register(tmp_path / "hub.yaml", "b", tmp_path / "a/keys/site.pub", say=said.append)
    with pytest.raises(ConfigError, match="site 'a' has another key already"):
        hub_commands.register(tmp_path / "hub.yaml", "a", tmp_path / "b/keys/site.pub", say=said.append)
    key = (tmp_path / "hub/keys/ca.key").read_bytes()
    hub_commands.init(tmp_path / "hub.yaml", HubInit(["localhost"], 1, 2), say=said.append)
    assert (tmp_path / "hub/keys/ca.key").read_bytes() == key


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "hub: what to do is missing; known: init, up; write"),
        (["upp", "hub.yaml"], "did you mean 'up'"),
        (["up"], "needs a .yaml file"),
        (["up", "port=3"], "needs a .yaml file"),
    ],
)
def test_words_that_say_nothing_are_one_line_with_an_example(words, line):
    with pytest.raises(ConfigError, match=line):
        worded(words, "hub", ("init", "up"))


def test_options_are_typed_and_unknown_ones_named():
    assert options(["port=3", "hosts=[a,b]"], HubInit) == HubInit(["a", "b"], 3)
    assert options(["name=on", "address=[::1]:8443"], SiteInit) == SiteInit("on", "[::1]:8443")
    with pytest.raises(ConfigError, match="port must be a whole number"):
        options(["port=x"], HubInit)
    with pytest.raises(ConfigError, match="did you mean 'port'"):
        options(["prot=3"], HubInit)
    with pytest.raises(ConfigError, match="prot: unknown key"):
        options(["prot=3"])


@pytest.mark.parametrize("name", ["ward_a", "on", "a: b", "null", "12", "{x}", "\u00e4rzte #3", "a'b\"c", "- x"])
@pytest.mark.parametrize("address", ["hub.example:8443", "[::1]:8443", "on"])
def test_what_init_writes_is_read_as_it_was_told(name, address, tmp_path, monkeypatch):
    monkeypatch.setattr(site_commands, "make_site_key", lambda path: None)
    for file in ("site.yaml", "a b: c.yaml"):
        site_commands.init(tmp_path / file, SiteInit(name, address), say=lambda line: None)
        place = SitePlace.read(tmp_path / file)
        assert (place.config.name, list(place.config.clients), place.config.server.address) == (name, [name], address)
        assert place.config.server.key == f"{(tmp_path / file).stem}/keys/site"
    if name == "ward_a":
        assert "name: ward_a  " in (tmp_path / "site.yaml").read_text()


@pytest.mark.parametrize("name", [" a", "a\nb", "x" * 101])
def test_a_name_that_no_site_can_have_writes_no_file(name, tmp_path):
    with pytest.raises(ConfigError, match="name: a name must be"):
        site_commands.init(tmp_path / "site.yaml", SiteInit(name), say=lambda line: None)
    with pytest.raises(ConfigError, match="node_port must be from 1 to 65535"):
        site_commands.init(tmp_path / "site.yaml", SiteInit("a", node_port=0), say=lambda line: None)
    with pytest.raises(ConfigError, match="hosts must be names"):
        hub_commands.init(tmp_path / "hub.yaml", HubInit(["a b"]), say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_what_only_reads_a_sites_file_imports_nothing_heavy():
    code = "import sys, fedproxy.sites.site_commands, fedproxy.sites.hub_commands; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_port_of_a_process_that_was_just_killed_is_waited_for():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        port = place.getsockname()[1]
        assert not freed(port, 0.1)
        threading.Timer(0.7, place.close).start()
        assert freed(port, 10)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Flower version: 1.42.0", ""),
        ("Flower version: 1.43.1.dev2", ""),
        ("Flower version: 1.41.9", "must be 1.42 or newer, below 1.44, got 1.41.9"),
        ("Flower version: 1.44.0", "below 1.44, got 1.44.0"),
        ("Flower version: 2.0", "below 1.44, got 2.0"),
        ("nothing", "got 'nothing"),
    ],
)
def test_a_flower_of_another_version_is_named(said, line, tmp_path):
    (tmp_path / "flwr").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "flwr").chmod(0o755)
    flower = Flower(tmp_path / "home", str(tmp_path))
    if not line:
        assert flower.version() in said
    else:
        with pytest.raises(ConfigError, match=line):
            flower.version()

"""The demonstration begins again where it was, and leaves no process behind."""

import subprocess
import sys
import time

import pytest

from fedproxy.errors import ConfigError
from fedproxy.sites import demo, hub_commands
from fedproxy.sites.hub_commands import HubInit

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def started(code):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_what_was_started_is_ended_and_what_does_not_hear_is_killed(monkeypatch):
    monkeypatch.setattr(demo, "_END_S", 1.0)
    deaf = started(DEAF)
    assert deaf.stdout.readline() == b"deaf\n"
    over = started("pass")
    over.wait()
    processes = [over, started("import time; time.sleep(600)"), deaf]
    began = time.monotonic()
    demo.end_all(processes)
    assert time.monotonic() - began < 20
    assert [process.returncode for process in processes] == [0, -15, -9]


class Commands:
    """Stands for all commands: hub init is done here, and the others are small programs that are noted."""

    def __init__(self, folder):
        self.folder, self.lines, self.processes = folder, [], []

    def __call__(self, folder, *words, output=None):
        self.lines.append(words)
        code = "pass"
        if words[:2] == ("hub", "init"):
            ports = {word.split("=")[0]: int(word.split("=")[1]) for word in words if "port=" in word}
            hub_commands.init(folder / "hub.yaml", HubInit(["localhost"], **ports), say=lambda line: None)
        if words[:2] == ("site", "init"):
            (folder / words[2].removesuffix(".yaml") / "keys").mkdir(parents=True, exist_ok=True)
        if words[1] == "up":
            code = "import time; print('hub is up, site is up', flush=True); time.sleep(600)"
        if words[0] == "fit":
            code = "raise SystemExit(7)"
        self.processes.append(subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output))
        return self.processes[-1]


WORDS = ("recipe=fedproxy_tiny", "data.rows_per_task=24")


def test_the_second_demonstration_goes_to_the_port_of_the_first(tmp_path, monkeypatch):
    pytest.importorskip("cryptography", reason="keys come with fedproxy[flower]")
    addresses = []
    for _ in range(2):
        monkeypatch.setattr(demo, "command", commands := Commands(tmp_path))
        assert demo.main([str(tmp_path), *WORDS]) == 7
        assert all(process.poll() is not None for process in commands.processes)
        assert commands.lines[-1][0] == "fit"
        addresses.append((tmp_path / "ward_a.yaml").read_text().split("address: ")[1].split(",")[0])
    assert addresses[0] == addresses[1]
    assert f"port: {addresses[0].strip(chr(39)).split(':')[1]}" in (tmp_path / "hub.yaml").read_text()


def test_a_program_that_does_not_come_up_ends_all_others(tmp_path, monkeypatch):
    pytest.importorskip("cryptography", reason="keys come with fedproxy[flower]")

    class Failing(Commands):
        def __call__(self, folder, *words, output=None):
            process = super().__call__(folder, *words, output=output)
            if words[:2] == ("site", "up"):
                process.terminate()
            return process

    monkeypatch.setattr(demo, "command", commands := Failing(tmp_path))
    with pytest.raises(ConfigError, match=r"site ward_a.yaml does not come up"):
        demo.main([str(tmp_path), *WORDS])
    assert all(process.poll() is not None for process in commands.processes)

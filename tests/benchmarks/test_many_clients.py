"""The measurement of many clients, at a tiny size: memory of both roles in every round, and the ratios of it."""

import os
import subprocess
import sys

import pytest

from benchmarks import many_clients

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")


def test_every_round_is_measured_in_the_main_process_and_in_workers(tmp_path):
    workers = ("engine.name=workers", "engine.workers=1")
    figures = many_clients.run(6, 2, 2, workers, tmp_path)
    assert {len(values) for name, values in figures.items() if name != "start_up"} == {2}
    assert figures["start_up"][0] > 0
    # a process with torch and a model takes more than 100 MiB, and less than 4 GiB
    assert all(100 * 2**10 < kib < 2**22 for kib in figures["workers"])
    assert all(kib > 100 * 2**10 for kib in figures["main"])
    assert all(seconds > 0 for seconds in figures["client_seconds"])


def test_processes_of_processes_count():
    command = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as shell:
        far = int(shell.stdout.readline())
        try:
            assert set(many_clients.descendants(shell.pid)) == {far}
            assert far in many_clients.descendants(os.getpid())
            assert many_clients.resident_kib(far) > 0
        finally:
            subprocess.run(["kill", str(far)], check=True)
    assert many_clients.resident_kib(far) == 0


def test_ratios_are_of_the_last_round(monkeypatch):
    runs = {
        10_000: {"main": [10, 20, 22], "workers": [0, 40, 60], "client_seconds": [1.0, 3.0, 5.0]},
        100: {"main": [9, 10, 11], "workers": [0, 30, 30], "client_seconds": [1.0, 1.0, 1.0]},
    }
    runs[10_000] |= {"round_seconds": [2.0, 3.0, 9.0], "start_up": [7.0]}
    runs[100] |= {"round_seconds": [2.0, 4.0, 9.0], "start_up": [6.0]}
    asked = []
    monkeypatch.setattr(many_clients, "_run", lambda size, _, overrides: asked.append(overrides) or runs[size])
    figures = many_clients.main(["warm=2", "engine.name=workers"])
    assert asked == [["engine.name=workers"]] * 2
    assert figures["growth"] == {"main": 22 / 20, "workers": 60 / 40}
    assert figures["per_number"] == {"main": 22 / 11, "workers": 60 / 30}
    assert figures["seconds"] == [1.0, 4.0]
    assert (figures["round"], figures["start_up"]) == ([3.0, 4.0], [7.0, 6.0])
    for run in runs.values():
        run["workers"] = [0, 0, 0]
    assert set(many_clients.main(["warm=2"])["growth"]) == {"main"}

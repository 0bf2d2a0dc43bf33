"""A federation that survives its clients: who is dropped is named everywhere, and the rest goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.federation.client import LocalClient

from .conftest import SMALL


def test_a_failing_client_is_left_out_and_named_in_log_journal_and_pages(run_tiny, monkeypatch, capsys):
    train = LocalClient.train

    def fail(self, broadcast, client_id, **limits):
        if broadcast.round == 2 and client_id == "tiny_places":
            raise RuntimeError("out of\nmemory")
        return train(self, broadcast, client_id, **limits)

    monkeypatch.setattr(LocalClient, "train", fail)
    report, folder = run_tiny("federation.rounds=3", "federation.min_clients=3", "evaluation.models=[]")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    why = {"tiny_places": "RuntimeError: out of memory"}
    assert [line.get("dropped", {}) for line in lines] == [{}, why, {}]
    assert [len(line["clients"]) for line in lines] == [4, 3, 4]
    assert lines[1]["upload_bytes"] * 4 == lines[0]["upload_bytes"] * 3
    assert lines[1]["download_bytes"] == lines[2]["download_bytes"]  # the client had received the broadcast
    assert (report.run.status, report.rounds[1].dropped) == ("completed", why)
    for page in ("report.md", "report.html"):
        assert "RuntimeError: out of memory" in (folder / page).read_text()
    assert "round 2: client 'tiny_places' is dropped: RuntimeError: out of memory" in capsys.readouterr().err


def workers_of(folder):
    """Return the process ids of the workers of the run in ``folder``."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if b"fedproxy.federation.worker" in command and str(folder).encode() in command:
            found.add(int(path.parent.name))
    return found


def wait_for(condition, process=None, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_killed_worker_then_killed_server_then_resume_give_the_bits_of_a_quiet_run(run_tiny, tmp_path):
    rounds = ("federation.rounds=4", "evaluation.models=[]", "data.rows_per_task=200")
    _, whole = run_tiny(*rounds, "engine.name=in_process", "engine.threads=1")
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "fedproxy.fit", *SMALL, *rounds, f"output_dir={folder}"]
    process = subprocess.Popen(
        [*command, "engine.name=workers", "engine.workers=2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    journal = folder / "rounds.jsonl"

    def finished(count):
        return journal.is_file() and journal.read_text().count("\n") >= count

    try:
        wait_for(lambda: finished(1), process)
        os.kill(min(workers_of(folder)), signal.SIGKILL)  # its client is tried again in a new process
        wait_for(lambda: finished(2), process)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not workers_of(folder), seconds=30)
    assert not finished(4)
    assert not any("dropped" in json.loads(line) for line in journal.read_text().splitlines())
    run_tiny(*rounds, "engine.name=workers", "engine.workers=3", "resume=auto", folder=folder)
    for group in ("state", "conflict"):
        left, right = (load_file(run / f"checkpoints/round_0004/{group}.safetensors") for run in (whole, folder))
        assert sorted(left) == sorted(right)
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (folder / "exchange").exists()

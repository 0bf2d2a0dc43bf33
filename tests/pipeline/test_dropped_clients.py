"""A federation that survives its clients: who is dropped is named everywhere, and the rest goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.federation.client.site import Site
from fedproxy.names import file_stem

from .conftest import SMALL


def test_a_failing_client_is_left_out_and_named_in_log_journal_and_pages(run_tiny, monkeypatch, capsys):
    train = Site.train

    def fail(self, broadcast, client_id, **limits):
        if broadcast.round == 2 and client_id == "tiny_places":
            raise RuntimeError("out of\nmemory")
        return train(self, broadcast, client_id, **limits)

    monkeypatch.setattr(Site, "train", fail)
    report, folder = run_tiny("federation.rounds=3", "federation.min_clients=3", "evaluation.models=[]")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    log = folder / "checkpoints/logs" / f"{file_stem('tiny_places')}.log"
    why = {"tiny_places": f"RuntimeError; details in the client's log checkpoints/logs/{log.name}"}
    assert "out of\nmemory" in log.read_text()
    assert [line.get("dropped", {}) for line in lines] == [{}, why, {}]
    assert [len(line["clients"]) for line in lines] == [4, 3, 4]
    assert lines[1]["upload_bytes"] * 4 == lines[0]["upload_bytes"] * 3
    assert lines[1]["download_bytes"] == lines[2]["download_bytes"]  # the client had received the broadcast
    assert (report.run.status, report.rounds[1].dropped) == ("completed", why)
    for page in ("report.md", "report.html"):
        assert log.name in (folder / page).read_text()
        assert "out of" not in (folder / page).read_text()
    assert "round 2: client 'tiny_places' is dropped: RuntimeError; details in" in capsys.readouterr().err


def _moved(group, change):
    """Return a change of one group of an update's extras."""

    def alter(update):
        extras = {name: dict(tensors) for name, tensors in update.extras.items()}
        extras[group] = {name: change(tensor) for name, tensor in extras[group].items()}
        return replace(update, extras=extras)

    return alter


def _renamed(group):
    def alter(update):
        (first, *rest) = sorted(update.extras[group])
        tensors = {"odd": update.extras[group][first], **{name: update.extras[group][name] for name in rest}}
        return replace(update, extras={**update.extras, group: tensors})

    return alter


ATTACKS = {
    "scaffold": (
        (lambda update: replace(update, extras={}), "lacks extras 'control_variates'"),
        (_renamed("control_variates"), "lacks extras['control_variates'] tensor "),
        (_moved("control_variates", lambda tensor: tensor[:1]), "got float32 (1, "),
        (_moved("control_variates", lambda tensor: 1e30 * tensor), "must lie within 1e+09"),
    ),
    "fisher": (
        (lambda update: replace(update, extras={}), "lacks extras 'fisher'"),
        (_moved("fisher", lambda tensor: tensor[:1]), "got float32 (1, "),
        (_moved("fisher", lambda tensor: -tensor), "must be non-negative"),
        (_moved("fisher", lambda tensor: 1e30 * tensor), "must lie within 1e+18"),
    ),
    "fedavg": (
        (lambda update: replace(update, num_examples=10**12), "num_examples must be the 8 that it was dealt"),
        (lambda update: replace(update, num_tokens=10**12), "num_tokens must be a whole number from 8 to "),
        (lambda update: replace(update, train_loss=float("nan")), "train_loss must be a number"),
        (lambda update: replace(update, seconds=10**400), "seconds must be a number"),
    ),
}
RULES = {
    "scaffold": ("regularizer.name=scaffold", "aggregator.name=fedavg"),
    "fisher": ("regularizer.name=none", "aggregator.name=fisher"),
    "fedavg": ("regularizer.name=none", "aggregator.name=fedavg", "aggregator.weighting=tokens"),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_hostile_client_neither_ends_nor_poisons_the_run(run_tiny, monkeypatch, rule):
    train = Site.train

    def attack(self, broadcast, client_id, **limits):
        update = train(self, broadcast, client_id, **limits)
        return ATTACKS[rule][broadcast.round - 1][0](update) if client_id == "tiny_places" else update

    monkeypatch.setattr(Site, "train", attack)
    brief = ("data.rows_per_task=8", "client.batch_size=4", "evaluation.models=[]")
    report, folder = run_tiny(*RULES[rule], *brief, "federation.rounds=4", "federation.min_clients=3")
    assert report.run.status == "completed"
    for line, (_, reason) in zip(report.rounds, ATTACKS[rule], strict=True):
        assert list(line.dropped) == ["tiny_places"]
        assert reason in line.dropped["tiny_places"]
        assert line.train_loss is not None
    for path in (folder / "checkpoints/round_0004").glob("*.safetensors"):
        for tensor in load_file(path).values():
            assert tensor.abs().max() < 1e6


def workers_of(folder):
    """Return the process ids of the workers of the run in ``folder``."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if b"fedproxy.federation.engines.worker" in command and str(folder).encode() in command:
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

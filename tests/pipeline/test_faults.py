"""Full disks and signals: what was there stays, a report says why, and the run that goes on has the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedproxy.config import load_config
from fedproxy.errors import CheckpointError
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.run import run
from fedproxy.reporting import RunReport
from fedproxy.strategies.trainable import lora

from .conftest import SMALL

TWO = ("data.rows_per_task=16", "federation.rounds=2", "evaluation.models=[]")
FULL = (28, "No space left on device")
HERE, WORKERS = "{name: in_process, threads: 1}", "{name: workers, workers: 1}"


@pytest.fixture(scope="module")
def whole(run_tiny):
    return run_tiny(*TWO)[1]


@pytest.fixture(scope="module")
def one_round(run_tiny):
    return run_tiny(*TWO, "federation.rounds=1")[1]


def read_all(folder):
    """Read every kept text file: none is half."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".yaml", ".md", ".html", ".jsonl"):
            found[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".jsonl":
            assert [json.loads(line) for line in path.read_text().splitlines()]
    return found


def fill(monkeypatch, name):
    """Make every write of a file of this name fail, as a full disk does: after a part of it."""
    replace, fsync, save = os.replace, os.fsync, lora.save_file

    def full_replace(source, target):
        if Path(target).name == name:
            raise OSError(*FULL)
        replace(source, target)

    def full_fsync(handle):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == name:
            raise OSError(*FULL)
        fsync(handle)

    def full_save(tensors, path, **options):
        save(tensors, path, **options)
        if Path(path).name == name:
            os.truncate(path, 100)
            raise SafetensorError("No space left on device")

    monkeypatch.setattr(os, "replace", full_replace)
    monkeypatch.setattr(os, "fsync", full_fsync)
    monkeypatch.setattr(lora, "save_file", full_save)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to tell files by their handles")
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, HERE) for name in ("config.yaml", "facts.json", "report.json", "README.md")),
        *((name, engine) for name in ("rounds.jsonl", "adapter_model.safetensors") for engine in (HERE, WORKERS)),
    ],
)
def test_a_full_disk_in_a_continuation_loses_nothing(whole, one_round, tmp_path, monkeypatch, name, engine):
    folder = tmp_path / "run"
    shutil.copytree(one_round, folder)
    before, config = (
        read_all(folder),
        load_config([*SMALL, *TWO, f"output_dir={folder}", "resume=auto", f"engine={engine}"]),
    )
    with monkeypatch.context() as patch:
        fill(patch, name)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            run(config)
    assert "\n" not in str(caught.value)
    after = read_all(folder)
    assert before.keys() <= after.keys()
    assert after["config.yaml"] == before["config.yaml"] or name != "config.yaml"
    assert after["rounds.jsonl"].startswith(before["rounds.jsonl"])
    assert load_file(folder / "adapter/adapter_model.safetensors")
    assert not list(folder.rglob(".*.part"))
    report = run(config)
    assert (report.run.status, len(report.rounds)) == ("completed", 2)
    for path in (
        "checkpoints/round_0002/state.safetensors",
        "fused/model.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        left, right = load_file(whole / path), load_file(folder / path)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[tensor], right[tensor]) for tensor in left)
    assert not list(tmp_path.glob(".*"))


def test_half_a_line_of_the_journal_is_none(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    journal, report = folder / "rounds.jsonl", folder / "report.json"
    text = journal.read_text()
    journal.write_text(text[:-40])  # killed while it was written
    report.unlink()
    again = run(load_config([*SMALL, *TWO, f"output_dir={folder}", "resume=auto"]))
    assert (again.run.status, len(again.rounds), journal.read_text()) == ("completed", 2, text)


def children(pid):
    """Return the processes that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            pass
    return found


@pytest.mark.parametrize(
    ("number", "engine"),
    [(signal.SIGTERM, HERE), (signal.SIGHUP, WORKERS)],
)
def test_a_signal_leaves_a_report_and_a_run_that_goes_on(tmp_path, number, engine):
    folder = tmp_path / "run"
    words = (*SMALL, "data.rows_per_task=16", "federation.rounds=500", "evaluation.models=[]", f"engine={engine}")
    command = [sys.executable, "-m", "fedproxy.fit", *words, f"output_dir={folder}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (folder / "rounds.jsonl").is_file() or not (folder / "rounds.jsonl").read_text().count("\n"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == ("workers" in engine)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    name = signal.Signals(number).name
    assert process.returncode == 128 + number, said
    assert said.splitlines()[-1] == f"ended by {name}; go on with the same command and resume=auto"
    assert "Traceback" not in said
    report = RunReport.load(folder)
    assert report.run.status == "failed"
    assert report.run.error == f"ended by {name}; go on with the same command and resume=auto"
    assert not (folder / "exchange").exists()
    assert not [path for path in folder.iterdir() if path.name == ".fedproxy.lock"]
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists()
    assert not RunFolder(folder).check(load_config([*words, f"output_dir={folder}", "resume=auto"]))  # it goes on


@pytest.mark.parametrize("engine", [HERE, WORKERS])
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path, engine):
    folder = tmp_path / "run"
    words = [*SMALL, *TWO, f"output_dir={folder}", f"engine={engine}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedproxy.fit", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/round_0001/progress.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run(load_config([*words, "resume=auto"])).run.status == "completed"
    for path in ("checkpoints/round_0002/state.safetensors", "fused/model.safetensors"):
        left, right = load_file(whole / path), load_file(folder / path)
        assert all(torch.equal(left[tensor], right[tensor]) for tensor in left)


def test_two_continuations_of_a_fresh_folder_one_runs(tmp_path):
    command = [sys.executable, "-m", "fedproxy.fit", *SMALL, *TWO, "resume=auto", f"output_dir={tmp_path / 'run'}"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = sorted((process.communicate()[1], process.returncode, process.pid) for process in started)
    codes = sorted(code for _, code, _ in ended)
    assert codes == [0, 2] or all("finished" in text for text, code, _ in ended if code == 0)
    refused = [text for text, code, _ in ended if code == 2]
    if refused:
        winner = next(pid for _, code, pid in ended if code == 0)
        assert refused[0].startswith(f"error: output_dir {tmp_path / 'run'} is in use by process {winner} on ")
        assert refused[0].count("\n") == 1
    assert RunReport.load(tmp_path / "run").run.status == "completed"


def test_a_defect_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    from fedproxy.pipeline import begin
    from fedproxy.pipeline.stages import federate

    def defect(*_):
        raise ZeroDivisionError("no such thing")

    words = [*SMALL, *TWO, f"output_dir={tmp_path / 'run'}"]
    for module, name in ((begin, "is_slow"), (begin, "save_partition"), (federate, "round_validation")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, defect)
            with pytest.raises(ZeroDivisionError):
                run(load_config([*words, "resume=auto"]))
        assert RunReport.load(tmp_path / "run").run.error == "ZeroDivisionError: no such thing"
    assert run(load_config([*words, "resume=auto"])).run.status == "completed"

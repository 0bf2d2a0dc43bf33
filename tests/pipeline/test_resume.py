"""Runs that are killed, repeated or continued: nothing is lost, nothing is overwritten."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.errors import CheckpointError, ConfigError, DataError
from fedproxy.federation.server.checkpoint import CheckpointFolder
from fedproxy.reporting import RunReport

from . import hooked_clients
from .conftest import SMALL

FOUR_ROUNDS = ("federation.rounds=4", "evaluation.models=[]")


def final_state(folder):
    return {g: load_file(folder / f"checkpoints/round_0004/{g}.safetensors") for g in ("state", "conflict")}


def assert_same_states(left, right):
    for group in left:
        assert sorted(left[group]) == sorted(right[group])
        assert all(torch.equal(left[group][name], right[group][name]) for name in left[group])


def test_kill_in_round_two_of_four_and_resume_is_bit_identical(run_tiny, tmp_path):
    _, whole = run_tiny(*FOUR_ROUNDS)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "fedproxy.fit", *SMALL, *FOUR_ROUNDS, f"output_dir={folder}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    journal = folder / "rounds.jsonl"
    deadline = time.monotonic() + 200
    while not (journal.is_file() and journal.read_text().count("\n") >= 1):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no round was finished in time"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert journal.read_text().count("\n") < 4
    report, _ = run_tiny(*FOUR_ROUNDS, "resume=auto", folder=folder)
    assert report.run.status == "completed"
    assert [line.round for line in report.rounds] == [1, 2, 3, 4]
    assert_same_states(final_state(whole), final_state(folder))


def test_kill_between_checkpoint_and_journal_loses_no_round(run_tiny, tmp_path):
    _, whole = run_tiny(*FOUR_ROUNDS)
    folder, hooks = tmp_path / "killed", tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "2.kill").touch()
    arguments = (*SMALL, *FOUR_ROUNDS, f"plugins=[{hooked_clients.NAME}]", f"output_dir={folder}")
    environment = {**os.environ, hooked_clients.VARIABLE: str(hooks), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fedproxy.fit", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    journal = folder / "rounds.jsonl"
    assert journal.read_text().count("\n") == 1
    assert CheckpointFolder(folder / "checkpoints").rounds() == [1, 2]
    report, _ = run_tiny(*FOUR_ROUNDS, "resume=auto", folder=folder)
    assert [json.loads(line)["round"] for line in journal.read_text().splitlines()] == [1, 2, 3, 4]
    assert [line.round for line in report.rounds] == [1, 2, 3, 4]
    assert_same_states(final_state(whole), final_state(folder))


def test_rounds_may_grow_and_equal_a_longer_run(run_tiny):
    _, whole = run_tiny(*FOUR_ROUNDS)
    _, folder = run_tiny("federation.rounds=2", "evaluation.models=[]")
    report, _ = run_tiny(*FOUR_ROUNDS, "resume=auto", folder=folder)
    assert len(report.rounds) == 4
    assert_same_states(final_state(whole), final_state(folder))


def test_a_finished_run_is_read_and_not_repeated(run_tiny):
    first, folder = run_tiny("evaluation.models=[]")
    stamp = (folder / "checkpoints/round_0002/state.safetensors").stat().st_mtime_ns
    again, _ = run_tiny("evaluation.models=[]", "resume=auto", folder=folder)
    assert again.to_dict() == first.to_dict()
    assert (folder / "checkpoints/round_0002/state.safetensors").stat().st_mtime_ns == stamp


def test_a_folder_with_a_run_is_refused_unless_told_what_to_do(run_tiny):
    _, folder = run_tiny("federation.rounds=0", "evaluation.models=[]")
    with pytest.raises(ConfigError, match=r"already holds a run; use resume=auto .*, overwrite=true .*, or another"):
        run_tiny("federation.rounds=0", "evaluation.models=[]", folder=folder)
    report, _ = run_tiny("federation.rounds=1", "evaluation.models=[]", "overwrite=true", folder=folder)
    assert len(report.rounds) == 1


def test_foreign_files_are_never_deleted(run_tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    (tmp_path / "config.yaml").write_text("mine: true")
    for way in ("overwrite=true", "resume=auto"):
        with pytest.raises(ConfigError, match="already contains files that are not a run; choose another output_dir"):
            run_tiny(way, folder=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_a_run_is_not_deleted_while_the_recipe_reads_from_it(run_tiny, tmp_path):
    _, folder = run_tiny("federation.rounds=0", "evaluation.models=[]")
    partition = folder / "partition.json"
    partition.write_text(partition.read_text().replace("tiny_places", "tiny_towns"))  # hours of work
    (tmp_path / "link.json").symlink_to(partition)
    (tmp_path / "same").symlink_to(folder)
    (folder / "mine.jsonl").write_text('{"text": "a"}\n' * 64)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for key, value in [
        ("data.partition.path", partition),
        ("data.partition.path", tmp_path / "link.json"),
        ("data.partition.path", tmp_path / "same/partition.json"),
        ("compression.calibration.path", folder / "mine.jsonl"),
        ("data.files.ward", folder / "mine.jsonl"),
        ("data.files.ward", folder / "mi*.jsonl"),
        ("data.template", folder / "mine.jsonl"),
        ("target.path", folder / "proxy"),
    ]:
        named = ["data.partition.name=file"] if "partition" in key else []
        with pytest.raises(
            ConfigError, match=rf"^overwrite=true would delete {key}=.*; copy it elsewhere and name the"
        ):
            run_tiny("evaluation.models=[]", *named, f"{key}={value}", "overwrite=true", folder=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_whose_partition_file_was_spoilt_goes_on_once_it_is_away(run_tiny):
    _, folder = run_tiny("federation.rounds=1", "evaluation.models=[]")
    path = folder / "partition.json"
    whole = path.read_text()
    path.write_text('{"clients": []}')
    more = ("federation.rounds=2", "evaluation.models=[]", "resume=auto")
    with pytest.raises(DataError, match=r"partition.json, .* with at least one client; put back .*, or delete it and"):
        run_tiny(*more, folder=folder)
    path.unlink()
    report, _ = run_tiny(*more, folder=folder)
    assert len(report.rounds) == 2
    assert path.read_text() == whole


def test_resume_under_another_configuration_names_the_key(run_tiny):
    _, folder = run_tiny("federation.rounds=0", "evaluation.models=[]")
    with pytest.raises(ConfigError, match=r"resume=auto: client.lr is 0.5, but the run in .* has 0.00?"):
        run_tiny("federation.rounds=0", "evaluation.models=[]", "client.lr=0.5", "resume=auto", folder=folder)


def test_a_checkpoint_with_a_missing_tensor_ends_in_one_line_and_a_report_that_says_so_or_the_finished_one(run_tiny):
    from safetensors.torch import save_file

    _, folder = run_tiny("federation.rounds=1", "evaluation.models=[]")
    path = folder / "checkpoints/round_0001/state.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"round_0001 is damaged \(state.safetensors: .*no checkpoint before it"):
        run_tiny("federation.rounds=2", "evaluation.models=[]", "resume=auto", folder=folder)
    assert RunReport.load(folder).run.status == "completed"  # of the round that was finished before
    (folder / "report.json").unlink()
    with pytest.raises(CheckpointError):
        run_tiny("federation.rounds=2", "evaluation.models=[]", "resume=auto", folder=folder)
    report = RunReport.load(folder)
    assert report.run.status == "failed"
    assert "state.safetensors" in report.run.error


def test_a_folder_that_cannot_be_written_is_one_line(run_tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"output_dir .*file/run cannot be written"):
        run_tiny("federation.rounds=0", folder=tmp_path / "file" / "run")

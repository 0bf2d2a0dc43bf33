"""Who holds a folder, what becomes of the lock, and that no two processes ever hold it at once."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from fedproxy import locks
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.locks import LOCK_FILE, locked

HOLD = "import sys, time\nfrom fedproxy.locks import locked\nwith locked(sys.argv[1]):\n print('held', flush=True)\n "


def holder(folder, then="sys.stdin.read()"):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD}{then}", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_refusal_names_process_and_machine_and_the_lock_leaves_nothing(tmp_path):
    folder = tmp_path / "runs" / "new"
    process = holder(folder)
    try:
        with pytest.raises(ConfigError) as caught, locked(folder):
            pass
        assert str(caught.value) == (
            f"output_dir {folder} is in use by process {process.pid} on {socket.gethostname()}; wait for it, or choose "
            "another output_dir"
        )
    finally:
        process.communicate("")
    assert not folder.exists()  # it was made for the lock alone


def test_a_killed_holder_leaves_the_lock_free(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / LOCK_FILE).is_file()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_threads_of_one_process_keep_each_other_out(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"), locked(tmp_path):
        pass


@pytest.mark.parametrize("boot", ["another", None])
def test_a_lock_of_another_machine_is_never_taken_over(tmp_path, boot):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"pid": 7, "host": "node12", "boot": boot}))
    with (
        pytest.raises(
            ConfigError, match=rf"is locked by process 7 on node12; if that process has ended, delete {path}"
        ),
        locked(tmp_path),
    ):
        pass
    path.unlink()
    with locked(tmp_path):
        pass


def test_a_lock_from_before_a_restart_or_of_a_container_on_this_machine_is_free(tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "boot": "another"}))
    with locked(tmp_path):
        pass
    path.write_text(json.dumps({"pid": 1, "host": "container", "boot": locks._boot()}))
    if locks._boot():
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": {}, "boot": 3}\x00'])
def test_an_odd_lock_file_is_no_holder(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with locked(tmp_path):
        pass


def test_without_locks_of_the_file_system_the_holder_counts_while_it_lives(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    process = holder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", none)
        with pytest.raises(ConfigError, match=f"in use by process {process.pid} on"), locked(tmp_path):
            pass
        process.kill()
        process.communicate()
        with locked(tmp_path):
            pass


def test_links_pipes_and_files_in_the_way_are_one_line(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for number, make in enumerate((lambda p: p.symlink_to(tmp_path / "victim"), os.mkfifo, os.mkdir)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / LOCK_FILE)
        with (
            pytest.raises(CheckpointError, match=r"cannot be written \(.*\); choose another output_dir"),
            locked(folder),
        ):
            pass
    with pytest.raises(CheckpointError, match="cannot be written"), locked(tmp_path / "victim" / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\); choose another"), locked(tmp_path / name):
        pass


def test_a_folder_that_another_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    """The last holder may remove it between the call that makes it and the look at what is there."""
    make, failures = locks.Path.mkdir, iter([FileExistsError, FileNotFoundError])

    def late(path, *args, **options):
        if error := next(failures, None):
            raise error(path)
        make(path, *args, **options)

    monkeypatch.setattr(locks.Path, "mkdir", late)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).is_file()


def test_many_processes_never_hold_it_together(tmp_path):
    """Each holder makes and removes a folder: two at once would meet."""
    work = (
        "import sys, os, time\nfrom fedproxy.locks import locked\nfrom fedproxy.errors import ConfigError\nwon = 0\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end:\n"
        "  try:\n"
        "    with locked(sys.argv[1]):\n"
        "      os.mkdir(sys.argv[2]); won += 1; os.rmdir(sys.argv[2])\n"
        "  except ConfigError: pass\n"
        "print(won)"
    )
    command = [sys.executable, "-c", work, str(tmp_path / "run"), str(tmp_path / "together")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [process.communicate() for process in started]
    assert [error for _, error in ended] == ["", "", ""]
    assert sum(int(won) for won, _ in ended) > 10
    assert not list((tmp_path / "run").glob("*"))

"""Ctrl-C, SIGTERM and SIGHUP end a command in one line with the exit code that schedulers know."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from fedproxy.command import exit_code_of
from fedproxy.errors import DataError
from fedproxy.interrupts import SIGNALS, Terminated, check_interrupt, handled


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """Tests that run in the background inherit signals that are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(1)  # the handler runs before this ends


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_one_line_and_128_more(number, capsys):
    before = signal.getsignal(number)
    assert exit_code_of(lambda: send(number)) == 128 + number
    said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    assert capsys.readouterr().err == f"{said}\n"
    assert signal.getsignal(number) is before


def test_it_counts_as_ctrl_c_for_those_who_clean_up():
    with pytest.raises(KeyboardInterrupt), handled():
        send(signal.SIGTERM)


def test_an_error_that_a_signal_caused_is_not_blamed(capsys):
    def swallowed():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise OSError(5, "Input/output error") from None  # of a terminal that is gone

    assert exit_code_of(swallowed) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "ended by SIGTERM\n"


def test_a_signal_that_a_library_swallowed_is_found_at_the_next_look():
    def swallowed():
        with suppress(BaseException):
            send(signal.SIGTERM)
        check_interrupt()

    assert exit_code_of(swallowed) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("first", "second"), [(signal.SIGHUP, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_a_second_signal_does_not_disturb_the_report_of_the_first(first, second):
    done = []

    def clean_up():
        try:
            send(first)
        finally:
            send(second)
            done.append("report")

    assert exit_code_of(clean_up) == 128 + first
    assert done == ["report"]


def test_nohup_stays_what_it_is():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code_of(lambda: send(signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_errors_and_ctrl_c_are_as_before(capsys):
    def fail():
        raise DataError("rows are\nmissing")

    def interrupt():
        raise KeyboardInterrupt("go on")

    assert (exit_code_of(fail), exit_code_of(interrupt)) == (2, 130)
    assert capsys.readouterr().err == "error: rows are missing\ninterrupted; go on\n"
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)
    assert str(Terminated(15, "go on")) == "go on"


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_code_of(os.getcwd) == 2
    assert capsys.readouterr().err == "error: the working directory was deleted; change into one that is there\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", ["recipe=fedproxy_tiny"]),
        ("compress", ["recipe=fedproxy_tiny"]),
        ("compare", ["recipes=[fedproxy_tiny]"]),
        ("evaluate", ["model=asset:tiny-llama", "tasks=[tiny_sums]"]),
    ],
)
def test_a_signal_at_start_up_leaves_nothing(tmp_path, command, words):
    arguments = [sys.executable, "-v", "-m", f"fedproxy.{command}", *words, f"output_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = []
    for line in process.stderr:  # what -v says of imports
        lines.append(line)
        if "import 'torch" in line or "import 'omegaconf'" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM
    # the signal may have come between a line of -v and its end
    said = re.findall(r"ended by SIGTERM$|^(?:error|Traceback|interrupted).*", rest, re.MULTILINE)
    assert said == ["ended by SIGTERM"]
    assert not (tmp_path / "out").exists()

"""What is shown of names and warnings: text as it is, never a command to the screen."""

import io
import logging

from rich.console import Console

from fedproxy.console import progress_console
from fedproxy.pipeline import display as module
from fedproxy.pipeline.display import Display


def shown(show):
    """What a terminal of 200 columns gets."""
    text = io.StringIO()
    show(Display(Console(file=text, force_terminal=True, width=200, highlight=False)))
    return text.getvalue()


def test_a_client_may_be_called_like_markup():
    def show(display):
        with display.bar("clients [/b]", 2) as bar:
            bar.step("round 1: ward [/icu]")
            bar._progress.refresh()
            bar.step("round 1: [bold red]ward[/]\x1b]0;owned\x07\n\u202e" + "x" * 1000)
            bar._progress.refresh()
            display.say("round 1: client 'ward [/icu]' is dropped: [link=x]it failed[/link]")

    text = shown(show)
    assert "round 1: ward [/icu]" in text
    assert "round 1: [bold red]ward[/] xxx" in text
    assert "owned" not in text
    assert "is dropped: [link=x]it failed[/link]" in text


def test_warnings_are_one_printable_line():
    def show(display):
        with display.warnings():
            logging.getLogger("fedproxy.x").warning("worker %s", "a\x1b[2Jb\nc" + "x" * 5000)

    text = shown(show)
    assert text.startswith("worker a b cxxx")
    assert "\x1b[2J" not in text
    assert len(text) < 1010


def test_a_log_file_gets_a_line_of_progress_every_half_minute(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    text = io.StringIO()
    with Display(Console(file=text, width=200)).bar("clients", 40) as bar:
        for _ in range(40):
            now += 12.0
            bar.step("round 1: [b]a[/b]")
    lines = text.getvalue().splitlines()
    assert lines[0] == "round 1: [b]a[/b]: 3 of 40, about 7 min 24 s left"
    assert lines[-1].endswith(": 39 of 40, about 12.0 s left")
    assert len(lines) == 13


def test_parts_that_go_on_count_by_their_share(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    text = io.StringIO()
    with Display(Console(file=text, width=200)).bar("clients", 3) as bar:
        for share in (0.25, 0.5):
            now += 60.0
            bar.share("round 1: a", "a", share)
        bar.share("round 1: b", "b", 0.1)
        bar.step("round 1: a", "a")
        now += 60.0
        bar.share("round 1: b", "b", 0.5)
    assert text.getvalue().splitlines() == [
        "round 1: a: 0 of 3, about 11 min 00 s left",
        "round 1: a: 0 of 3, about 10 min 00 s left",
        "round 1: b: 1 of 3, about 3 min 00 s left",
    ]


def test_quick_work_leaves_no_line_in_a_log_file():
    text = io.StringIO()
    with Display(Console(file=text, width=200)).bar("clients", 2) as bar:
        bar.step("a")
        bar.set(2, 2)
    assert text.getvalue() == ""


def test_a_notebooks_cell_gets_lines(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert progress_console().is_terminal
    monkeypatch.setenv("JPY_PARENT_PID", "7")
    assert not progress_console().is_terminal

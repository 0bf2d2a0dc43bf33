"""What is shown of names and warnings: text as it is, never a command to the screen."""

import io
import logging

from rich.console import Console

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

"""A page in a notebook: in a frame of its own, so that neither changes how the other looks."""

import html
from pathlib import Path


def framed(page: Path | None) -> str | None:
    """Return the HTML that shows a page; None where it is not there.

    The frame runs no script and opens no window.
    """
    if page is None or not page.is_file():
        return None
    text = html.escape(page.read_text(encoding="utf-8"))
    return f'<iframe srcdoc="{text}" sandbox="" title="report" style="width:100%;height:640px;border:0"></iframe>'

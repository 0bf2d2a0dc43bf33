"""A page in a notebook: in a frame of its own, so that neither changes how the other looks."""

import html
from pathlib import Path


def framed(page: Path | None) -> str | None:
    """Return the HTML that shows a page; None where it is not there, or cannot be read.

    The frame runs no script and opens no window.
    """
    try:
        text = html.escape(page.read_text(encoding="utf-8")) if page and page.is_file() else None
    except (OSError, UnicodeDecodeError):
        text = None
    if text is None:
        return None
    return f'<iframe srcdoc="{text}" sandbox="" title="report" style="width:100%;height:640px;border:0"></iframe>'

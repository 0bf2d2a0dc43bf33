"""Where progress is shown: on standard error, redrawn in a terminal and as lines elsewhere."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def progress_console() -> "Console":
    """Return the console of standard error.

    A command in a notebook's cell (``!fedproxy fit ...``) has a terminal, which keeps each state of a bar: it counts as
    none.
    """
    from rich.console import Console

    in_notebook = "JPY_PARENT_PID" in os.environ
    return Console(stderr=True, highlight=False, force_terminal=False if in_notebook else None)

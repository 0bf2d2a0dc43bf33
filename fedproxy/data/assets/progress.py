"""Progress on standard error: a byte bar for downloads, a spinner for conversions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedproxy.console import progress_console


@contextmanager
def byte_bar(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Show a download bar and yield a function that takes the bytes done so far."""
    if not show:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=progress_console()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


@contextmanager
def step(label: str, show: bool) -> Iterator[None]:
    """Show a spinner with a label while a step without a measure runs."""
    if not show:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=progress_console()) as bar:
        task = bar.add_task(label, total=1)
        yield
        bar.update(task, completed=1)

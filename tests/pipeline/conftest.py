"""One small run of the tiny recipe that many tests look at."""

from pathlib import Path

import pytest

from fedproxy.config import load_config
from fedproxy.pipeline.ownership import first_foreign
from fedproxy.pipeline.run import run
from fedproxy.reporting import html

SMALL = (
    "recipe=fedproxy_tiny",
    "data.rows_per_task=32",
    "client.batch_size=8",
    "federation.rounds=2",
    "evaluation.limit=12",
)


@pytest.fixture(scope="session")
def run_tiny(tmp_path_factory):
    """Run the tiny recipe with overrides in a folder of its own and return (report, folder)."""

    def go(*overrides: str, folder: Path | None = None):
        fresh, folder = folder is None, folder or tmp_path_factory.mktemp("run") / "out"
        report = run(load_config([*SMALL, f"output_dir={folder}", *overrides]))
        assert not fresh or first_foreign(folder) is None  # a run knows all that it makes as its own
        return report, folder

    return go


@pytest.fixture(scope="session")
def tiny_run(run_tiny):
    """Report and folder of two rounds; tests must not change the folder."""
    return run_tiny()


@pytest.fixture
def plots():
    """For tests that look at a run's plots."""


@pytest.fixture(autouse=True)
def _pages_without_plots(request, monkeypatch):
    """Leave plots out of pages: they take a fifth of a small run. ``tiny_run`` and commands have them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(html, "draw_plots", lambda report: [])

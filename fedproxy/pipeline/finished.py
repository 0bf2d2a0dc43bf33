"""A finished run that the same command asks for again is recognised before anything heavy is imported."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import fedproxy
from fedproxy.config.loading import read_early
from fedproxy.errors import FedProxyError
from fedproxy.files import at_home, file_sha256, read_json, write_json
from fedproxy.sealed import first_lost, read_sealed

PAGES = ("config.yaml", "report.json", "report.md", "report.html")
"""What a finished run has beside the files that it noted."""

if TYPE_CHECKING:
    from fedproxy.config import RunConfig
    from fedproxy.reporting.run_report import RunReport


def finished(arguments: Sequence[str]) -> "RunReport | None":
    """Return the report of the run that these very arguments finished.

    None in all other cases, also where it takes more to tell: whoever asks then does the run, which looks closer.

    Args:
        arguments: Words of the command line.

    Raises:
        ConfigError: For what can be refused at once.
    """
    early = read_early(arguments)
    if early is None:
        return None
    config, sha256 = early
    if config.resume != "auto" or config.overwrite or config.accept_changed:
        return None
    folder = at_home(config.output_dir)
    try:
        noted, report = read_json(_note(folder), dict), folder / "report.json"
        made = (read_sealed(folder / "server" / "facts.json") or {})["files"]
        if noted != _content(sha256, report) or first_lost(folder, made, PAGES):
            return None
        from fedproxy.reporting.run_report import RunReport

        return RunReport.load(report)
    except (OSError, FedProxyError, KeyError):
        return None


def note_finished(arguments: Sequence[str], config: "RunConfig") -> None:
    """Note that these arguments finished a run, unless its questions lie in files, which may change.

    The run is finished without it too: what cannot be noted takes longer to be recognised.

    Args:
        arguments: Words of the command line.
        config: What they say.
    """
    from fedproxy.pipeline.asked import asked_of, asked_sha256

    early, folder = read_early(arguments), at_home(config.output_dir)
    if early is None or config.evaluation.files:  # not read again to say so
        return
    with suppress(OSError, FedProxyError):
        if not asked_sha256(config, asked_of(config)):
            write_json(_note(folder), _content(early[1], folder / "report.json"))


def _note(folder: Path) -> Path:
    return folder / "server" / "finished.json"


def _content(settings_sha256: str, report: Path) -> dict[str, str]:
    return {"fedproxy": fedproxy.__version__, "settings_sha256": settings_sha256, "report_sha256": file_sha256(report)}

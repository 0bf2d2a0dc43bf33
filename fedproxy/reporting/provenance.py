"""What made a run's numbers: versions, commit and hardware, gathered without importing anything heavy."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import fedproxy
from fedproxy.machine import cores, memory_bytes, processor
from fedproxy.reporting.run_report import Provenance

PACKAGES = ("torch", "transformers", "lightning", "peft", "lm_eval", "datasets", "omegaconf")
"""Distributions whose version can change a score."""


def provenance(target_sha256: str | None = None, data_sha256: str | Mapping[str, str] | None = None) -> Provenance:
    """Return the provenance of a run on this machine.

    Args:
        target_sha256: Hash of the target's weights.
        data_sha256: Hash of the data, or one hash per task.
    """
    return Provenance(versions(), git_commit(), target_sha256, data_sha256, hardware())


def versions() -> dict[str, str]:
    """Return the versions of Python, FedProxy and the packages in :data:`PACKAGES` that are installed."""
    found = {"fedproxy": fedproxy.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout that FedProxy runs from, with ``-dirty`` if tracked files were changed.

    None for an installed package: the version names it. A user's own repository around a virtual environment is not
    taken for ours.
    """
    root = Path(fedproxy.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Return ``cpu``, ``cores``, ``memory_bytes``, ``platform`` and, where torch is loaded already, ``gpus``."""
    found: dict[str, Any] = {
        "cpu": processor(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "platform": platform.platform(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found

"""JSON as the standard has it (no NaN, no infinity), written whole or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError


def plain(value: Any) -> Any:
    """Return ``value`` as JSON types: tensors and arrays become lists, NaN and infinities become None.

    Raises:
        TypeError: If a value has no JSON form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # torch tensors and NumPy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` through a temporary file and a rename, so that readers never see half of it.

    Raises:
        CheckpointError: If the folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the owner reads
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.strerror or error}); free the path or choose another output_dir"
        ) from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON; see :func:`plain` and :func:`write_text`."""
    return write_text(path, json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

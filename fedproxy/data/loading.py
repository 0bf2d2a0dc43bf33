"""The one place where data sets are read by a library: saved folders and those of the hub.

``datasets`` runs no code that lies beside data; whatever else goes wrong is one line.
"""

from pathlib import Path
from typing import Any

from fedproxy.errors import DataError, first_line


def load_saved(folder: Path) -> Any:
    """Return the data set, or the data sets by split, of a ``save_to_disk`` folder.

    Raises:
        DataError: If it is not one.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:  # a damaged file fails in whatever library meets it first
        raise DataError(f"{folder} is no whole save_to_disk folder ({first_line(error)}); save it again") from error


def load_from_hub(path: str, split: str) -> Any:
    """Return a split of the hub's data set ``path``.

    Raises:
        DataError: If the hub cannot be reached, or has no such data set or split.
    """
    from datasets import load_dataset

    try:
        return load_dataset(path, split=split)
    except Exception as error:  # the hub's client fails with many kinds, and all of them mean the same here
        raise DataError(
            f"{path} is no local file or folder, and the hub gave no split {split!r} of it ({first_line(error)}); "
            "give an existing file or folder, asset:NAME or a hub id"
        ) from error

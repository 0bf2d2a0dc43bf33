"""The one place where data sets are read by a library: those of the hub.

``datasets`` runs no code that lies beside data; whatever else goes wrong is one line.
"""

from typing import Any

from fedproxy.errors import DataError, first_line


def load_from_hub(path: str, split: str) -> Any:
    """Return a split of the hub's data set ``path``.

    Raises:
        DataError: If the hub cannot be reached, or has no such data set or split.
    """
    from datasets import load_dataset

    from fedproxy.model_hub import hub_or_its_cache, hub_says

    try:
        with hub_or_its_cache():
            return load_dataset(path, split=split)
    except Exception as error:  # the hub's client fails with many kinds, and all of them mean the same here
        reason = hub_says(error) or first_line(error)
        raise DataError(
            f"{path} is not a local file or folder, and the hub gave no split {split!r} of it ({reason}); "
            "give an existing file or folder, asset:NAME or a hub id"
        ) from error

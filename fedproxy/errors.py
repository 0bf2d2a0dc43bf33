"""Errors that a user, a client or a file can cause: each is one line that names the key, the rule and the way out."""

import difflib
from collections.abc import Iterable


class FedProxyError(Exception):
    """Base of every error with a way out; commands print it as one line and end with exit code 2."""


class ConfigError(FedProxyError):
    """A recipe or a command line asks for something that does not exist, does not fit or cannot be done."""


class DataError(FedProxyError):
    """A data file, a data set or one of its rows cannot be used."""


class AssetError(FedProxyError):
    """An asset cannot be fetched, verified or converted."""


class ModelError(FedProxyError):
    """A model cannot be loaded, compressed or fused."""


class ClientError(FedProxyError):
    """A client's update or training is at fault."""


class CheckpointError(FedProxyError):
    """A run folder or a checkpoint cannot be written, read or resumed."""


class EvaluationError(FedProxyError):
    """An evaluation task or setting cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint ``; did you mean X?`` for the known name closest to ``name``, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""

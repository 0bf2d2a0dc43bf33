"""Engines: where and how a round's clients run."""

from fedproxy.federation.engines.base import (
    Answer,
    Answers,
    Client,
    Dropped,
    Engine,
    RemoteClient,
    RunningEngine,
    UpdateFile,
)
from fedproxy.registry import import_members

import_members(__name__, __path__)

__all__ = ["Answer", "Answers", "Client", "Dropped", "Engine", "RemoteClient", "RunningEngine", "UpdateFile"]

"""Engines: where and how a round's clients run."""

from fedproxy.federation.client.base import Client, RemoteClient
from fedproxy.federation.engines.base import Engine
from fedproxy.registry import import_members

import_members(__name__, __path__)

__all__ = ["Client", "Engine", "RemoteClient"]

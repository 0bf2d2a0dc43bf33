"""Processes of one client that need torch alone: they answer, die, fail or hang as a file named by their rank asks."""

import os
import signal
import time
from pathlib import Path

from fedproxy.errors import ClientError
from fedproxy.federation.engines import RemoteClient

from .engines.doubles import honest


def remote(folder: Path) -> RemoteClient:
    return RemoteClient(f"{__name__}:make", {"folder": str(folder)}, ranks=2)


def make(*, device, folder, rank, rendezvous):
    if (Path(folder) / f"slow_{rank}").exists():
        time.sleep(1.5)
    if (Path(folder) / f"start_{rank}").exists():
        raise ClientError("there is no room for the proxy")
    return _Process(Path(folder), rank)


class _Process:
    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank

    def train(self, broadcast, client_id):
        with (self.folder / f"seen_{self.rank}").open("a") as file:
            file.write(f"{client_id} {os.getpid()}\n")
        path = self.folder / f"rank_{self.rank}"
        word, _, once = path.read_text().partition(" ") if path.is_file() else ("", "", "")
        if once:
            path.unlink()
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "fail":
            raise ClientError("out of memory")
        if word == "hang":
            time.sleep(3600)
        if word == "peer gone":
            raise RuntimeError("connection closed by peer")
        return honest(client_id, broadcast.round)

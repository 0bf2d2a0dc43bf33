"""A worker process: ``python -m fedproxy.federation.engines.worker SETUP DEVICE THREADS``, of the engine ``workers``.

It makes its client once, then trains whichever client standard input names and answers on standard output,
one JSON object per line. Tensors travel in safetensors files whose paths the messages name; nothing is ever unpickled.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TextIO

import torch

from fedproxy.errors import CheckpointError, FedProxyError, one_line
from fedproxy.federation.client.base import Attempt, Client, listening
from fedproxy.messages import Answer, Dropped, Facts, Message, Sums
from fedproxy.protocol import Broadcast, ClientUpdate


def main(setup: Path, device: int | None, threads: int) -> None:
    """Serve clients until standard input closes."""
    channel = _take_over_output()
    tasks: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
    Thread(target=_listen, args=(tasks,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        options = json.loads(setup.read_text())
        client = _make_client(options, device)
    except Exception as error:
        kind = "" if isinstance(error, FedProxyError) else f"{type(error).__name__}: "
        _say(channel, failed=f"{kind}{one_line(error)}")
        raise
    _say(channel, ready=True)
    broadcasts = _Broadcasts()
    while True:
        task = tasks.get()
        _say(channel, started=task["task"])
        try:
            with listening(partial(_tell, channel, task["task"])):
                answer = _serve(client, broadcasts, task, options["logs"])
        except CheckpointError as error:  # the run's fault, not the client's
            _say(channel, task=task["task"], damaged=one_line(error))
            continue
        if isinstance(answer, Dropped):
            _say(channel, task=task["task"], dropped=answer.reason)
        elif isinstance(answer, Facts | Sums):
            _say(channel, task=task["task"], says=answer.plain())
        else:
            _say(channel, task=task["task"])


def _tell(channel: TextIO, task: int, share: float) -> None:
    _say(channel, task=task, share=share)


def _serve(client: Client, broadcasts: "_Broadcasts", task: Mapping[str, Any], logs: str | None) -> Answer:
    """Do a task, and put the file that answers it, if one does, where the task says."""
    message = task["message"]
    with Attempt(task["client"], task["round"], logs) as tried:
        if message["kind"] == "train":
            tried.answered(client.train(broadcasts.load(task["broadcast"]).with_own(message), task["client"]))
        else:
            tensors = broadcasts.load(task["broadcast"]).extras if "broadcast" in task else {}
            tried.answered(client.answer(Message.of(message, tensors), task["client"]))
        if "update" in task and isinstance(tried.answer, ClientUpdate):  # of several processes of a client, one writes
            tried.answer.save(task["update"])
    return tried.answer


class _Broadcasts:
    """Reads each round's broadcast once."""

    def __init__(self) -> None:
        self._path, self._broadcast = "", Broadcast(0, {})

    def load(self, path: str) -> Broadcast:
        if path != self._path:
            self._path, self._broadcast = path, Broadcast.load(path)
        return self._broadcast


def _make_client(setup: Mapping[str, Any], device: int | None) -> Client:
    for module in setup["plugins"]:
        importlib.import_module(module)
    module, _, name = setup["factory"].partition(":")
    client: Client = getattr(importlib.import_module(module), name)(device=device, **setup["options"])
    return client


def _take_over_output() -> TextIO:
    """Return what was standard output; whatever libraries print goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def _listen(tasks: "SimpleQueue[Mapping[str, Any]]") -> None:
    """Pass tasks on; when the server closes the pipe, or dies, end the process in the middle of whatever it does."""
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)


def _say(channel: TextIO, **message: Any) -> None:
    channel.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2] else None, int(sys.argv[3]))

"""The relay at the server: does what the run asks on its socket, until the run hangs up."""

import os
import re
import socket
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from fedproxy_relay.frames import receive, send
from fedproxy_relay.records import packed, unread

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run; it is found by a word that says nothing."""
    token = str(context.run_config["token"])
    if not re.fullmatch("[0-9a-f]{32}", token):
        return
    with socket.socket(socket.AF_UNIX) as place:
        place.connect(os.path.join(os.environ["FEDPROXY_HUB_SOCKETS"], f"{token}.sock"))
        with place.makefile("rwb") as stream:
            _serve(grid, stream)


def _serve(grid: Grid, stream: Any) -> None:
    send(stream, {"relay": 1})
    while True:
        try:
            asked, payload = receive(stream)
        except (EOFError, OSError):
            return
        try:
            answer = _WORK[asked["op"]](grid, asked, payload)
        except Exception as error:  # Flower's own troubles: the run decides what they mean
            answer = {"error": type(error).__name__}, b""
        del payload
        send(stream, *answer)
        del answer


def _nodes(grid: Grid, asked: dict, payload: bytes) -> tuple[dict, bytes]:
    found = grid.get_nodes()
    return {"nodes": [{"id": str(n.node_id), "name": n.name, "online": n.status == "online"} for n in found]}, b""


def _push(grid: Grid, asked: dict, payload: bytes) -> tuple[dict, bytes]:
    ids = grid.push_messages(list(_messages(asked, payload)))
    return {"ids": list(ids)}, b""


def _messages(asked: dict, payload: bytes) -> Iterable[Message]:
    """Yield a message for each site; they share the payload, which Flower then takes once."""
    for to in asked["to"]:
        content = packed(to["head"], payload)
        yield Message(content, int(to["node"]), MessageType.QUERY, ttl=float(asked["ttl"]))


def _pull(grid: Grid, asked: dict, payload: bytes) -> tuple[dict, bytes]:
    """Look for one reply: of many at once all would lie in memory. The run reads what a site says, not this."""
    try:
        for reply in grid.pull_messages([asked["id"]]):
            if reply.has_error():
                return {"state": "error", "code": int(reply.error.code)}, b""
            text, data = unread(reply.content)
            if len(data) > asked["most"]:
                return {"state": "error", "code": asked["too_large"]}, b""
            return {"state": "reply", "text": text}, data
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # of no relay of ours
        return {"state": "error", "code": 2}, b""
    return {"state": "none"}, b""


_WORK = {"nodes": _nodes, "push": _push, "pull": _pull}

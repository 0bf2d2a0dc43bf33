"""A courier in memory: sites are functions, and what goes wrong on the way is said beforehand."""

import itertools
import time
from collections import Counter

from fedproxy.wire.courier import NONE_YET, TOO_LARGE, CourierError, Node, Reply


class FakeCourier:
    """Carries messages to functions.

    Args:
        sites: By name, what takes a line and a file and returns a line and a source.
        folder: Where payloads lie.
    """

    def __init__(self, sites, folder):
        self.sites, self.folder = dict(sites), folder
        folder.mkdir(parents=True, exist_ok=True)
        self.offline, self.errors, self.silent = set(), {}, set()
        self.swallowed = Counter()
        """By site, how many of the next messages are lost without a word."""
        self.breaks = 0
        self.sent, self.bytes, self.largest = [], Counter(), 0
        self.closed = False
        self._waiting, self._numbers = {}, itertools.count()

    def nodes(self):
        self._break()
        return [Node(f"id-{name}", name, name not in self.offline) for name in self.sites]

    def push(self, to, payload, ttl_s):
        self._break()
        path = self.folder / f"payload_{next(self._numbers)}"
        with open(path, "wb") as file:
            for piece in payload.pieces():
                file.write(piece)
        self.largest = max(self.largest, path.stat().st_size)
        self.bytes["pushed"] += path.stat().st_size
        ids = {}
        for node, line in to.items():
            name = node.removeprefix("id-")
            ids[node] = f"message-{next(self._numbers)}"
            lost = line["kind"] != "ping" and self.swallowed[name] > 0
            self.swallowed[name] -= lost
            self._waiting[ids[node]] = (name, line, path, lost)
            self.sent.append((name, line["kind"], ttl_s))
        return ids

    def pull(self, message, payload, *, most):
        self._break()
        name, line, path, lost = self._waiting[message]
        codes = self.errors.get(name, [])
        if codes:
            code = codes.pop(0)
            if code == "after":  # the site does its work and the reply is lost
                self.sites[name](dict(line), path)
                code = 4
            return Reply("error", {}, code)
        if name in self.silent or lost:
            return NONE_YET
        head, source = self.sites[name](dict(line), path)
        if source.size > most:
            return Reply("error", {}, TOO_LARGE)
        with open(payload, "wb") as file:
            for piece in source.pieces():
                file.write(piece)
        self.bytes["pulled"] += source.size
        return Reply("reply", head)

    def close(self):
        self.closed = True

    def _break(self):
        if self.breaks:
            self.breaks -= 1
            raise CourierError("the line is cut")


def waited(check, seconds=10.0):
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until
        time.sleep(0.05)

"""The server's side of the wire: asks sites, waits for them within limits, and sends and fetches files in parts."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.errors import ClientError
from fedproxy.wire.bundle import Bundle
from fedproxy.wire.courier import LOST, NO_ANSWER, REPLY_LOST, TOO_LARGE, Courier, CourierError, Node
from fedproxy.wire.frames import MOST_HEAD, NOTHING, Head, Source, sha256
from fedproxy.wire.inbox import Inbox, Piece
from fedproxy.wire.messages import told

_log = logging.getLogger(__name__)
MARGIN_S = 120.0
"""Seconds beyond its own limit that a site has to answer: the courier's polling, its own retries, a slow line."""
_STEP_S = 300.0
"""Seconds that a part of a file may take."""
_AGAIN = ("site_down", "busy", "damaged")
"""Refusals after which a site is asked again."""
_ERRORS = {
    1: "its relay does not start",
    NO_ANSWER: "its relay failed",
    TOO_LARGE: "it sends more than it was asked for",
}
_LOOK_S, _PAUSE_S, _AGAIN_S = 2.0, 0.25, 2.0


@dataclass(frozen=True)
class Terms:
    """How patient a link is."""

    wait_s: float = 120.0
    """Seconds that a site may be away before it is given up."""
    attempts: int = 2
    """How often a message is sent whose site or relay died."""
    part_bytes: int = 128 << 20
    """Largest part of a file."""
    most_bytes: int = 8 << 30
    """Largest file that a site may send."""
    ping_s: float = 60.0
    """Seconds of silence after which a site is pinged; four times as long after each ping."""


@dataclass(frozen=True)
class Came:
    """What came of asking one site."""

    site: str
    head: Head
    file: Path
    """The bytes that came with it; to be used before the next answer is asked for."""
    lost: str | None = None
    """Why there is no answer, in words."""


@dataclass
class _Asked:
    """One site that has still to answer."""

    line: Head
    payload: Source
    size: int = 0
    """Bytes of the line, as a text within a line."""
    message: str | None = None
    opened: int = 0
    """Which opening of the courier it was sent through; it is known to no later one."""
    tries: int = 0
    ping: str | None = None
    """The message of the latest ping; None where it was answered."""
    ping_at: float = 0.0
    """When the next one is due."""
    ping_again_s: float = 0.0
    """How long after it the one behind it is due."""
    away_since: float | None = None
    not_before: float = 0.0
    refused: str = ""


class Link:
    """Talks to sites through a courier, which is opened anew when it breaks.

    Args:
        connect: Opens the courier.
        terms: How patient it is.
        folder: Where parts and files lie on their way.
    """

    def __init__(self, connect: Callable[[], Courier], terms: Terms, folder: Path) -> None:
        self._connect, self.terms, self.folder = connect, terms, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._courier: Courier | None = None
        self._nodes: Mapping[str, Node] = {}
        self._looked, self._openings = 0.0, 0

    def close(self) -> None:
        """Let go of the courier."""
        courier, self._courier = self._courier, None
        if courier is not None:
            courier.close()

    def ask(
        self,
        lines: Mapping[str, Head],
        seconds: float,
        payloads: Mapping[str, Source] | None = None,
        *,
        most: int = 0,
        margin_s: float = MARGIN_S,
        remind_s: float | None = None,
    ) -> Iterator[Came]:
        """Send each site its line and its bytes, and yield what comes of it, as it comes.

        The time that an answer's receiver needs for it, to fetch the rest of its files, is not the other sites'.

        Args:
            lines: What to say, by site.
            seconds: How long a site may take.
            payloads: Bytes that go with the lines, by site; those that several sites are sent are uploaded once.
            most: Most bytes that may come back with an answer.
            margin_s: How much longer it may take until a site has said so.
            remind_s: Seconds after which a line of the log says, again and again, who has not answered yet.

        Raises:
            CourierError: If the courier cannot be opened again.
        """
        now, file = time.monotonic(), self.folder / "answer"
        sent = payloads or {}
        left = {site: _Asked(line, sent.get(site, NOTHING), _size_of(line)) for site, line in lines.items()}
        for site, asked in list(left.items()):
            if asked.size > MOST_HEAD:
                del left[site]
                why = f"what it is to be told of its clients has {asked.size} bytes, {MOST_HEAD} are the most"
                yield self._lost(site, f"{why}; let fewer of them take part in a round")
        limit = now + seconds + margin_s + self.terms.wait_s
        remind = math.inf if remind_s is None else now + remind_s
        while left:
            try:
                for answer in self._pull(left, file, most):
                    began = time.monotonic()
                    yield answer
                    limit += time.monotonic() - began
                self._look()
                yield from self._give_up(left, limit)
                self._push(left, seconds + margin_s)
                self._ping(left, seconds + margin_s)
                if remind_s is not None and left and time.monotonic() > remind:
                    _log.warning("no answer yet from %s: busy with an earlier round, or away", ", ".join(sorted(left)))
                    remind = time.monotonic() + remind_s
            except CourierError as error:
                self._reconnect(error)
            if left:
                time.sleep(_PAUSE_S)

    def send(self, run: str, bundle: Bundle, have: Mapping[str, int], *, all_of_it: bool) -> dict[str, str]:
        """Send a bundle to sites in parts, each uploaded once for all that lack it.

        Args:
            run: The run's name.
            bundle: What to send.
            have: Bytes that each site holds of it.
            all_of_it: Whether its last part goes too, or is kept for the message that needs the bundle.

        Returns:
            Sites that did not take it, with why.
        """
        have, lost = dict(have), dict[str, str]()
        end = bundle.size if all_of_it else self._last(bundle)
        while lacking := {site: there for site, there in have.items() if there < end}:
            offset = min(lacking.values())
            to = [site for site, there in lacking.items() if there == offset]
            part = bundle.part(offset, self.terms.part_bytes)
            line = {"kind": "put", "run": run, "piece": _piece(bundle, offset, part)}
            for answer in self.ask(dict.fromkeys(to, line), _STEP_S, dict.fromkeys(to, part)):
                there = answer.head.get("have")
                if answer.lost is not None or type(there) is not int or not offset + part.size <= there <= bundle.size:
                    lost[answer.site] = answer.lost or "it takes no part of what it is sent"
                    del have[answer.site]
                else:
                    have[answer.site] = there
        return lost

    def last_part(self, bundle: Bundle) -> tuple[dict[str, Any], Source]:
        """Return what the message says that brings a bundle's last part, and the part."""
        offset = self._last(bundle)
        part = bundle.part(offset, self.terms.part_bytes)
        return _piece(bundle, offset, part), part

    def fetch(self, run: str, answer: Came) -> Path:
        """Return the whole file of which an answer brought the first part; the rest is asked for now.

        Raises:
            ClientError: If the site does not send the file that it announced.
        """
        piece = Piece.parse(answer.head.get("piece"), most=self.terms.most_bytes)
        inbox = Inbox(self.folder / "inbox")
        inbox.drop(piece.file)
        have = self._added(inbox, piece, answer.file, 0)
        while have < piece.total:
            line = {"kind": "get", "run": run, "file": piece.file, "offset": have, "length": self.terms.part_bytes}
            for part in self.ask({answer.site: line}, _STEP_S, most=self.terms.part_bytes):
                if part.lost is not None:
                    raise ClientError(part.lost)
                following = Piece.parse(part.head.get("piece"), most=self.terms.most_bytes)
                if (following.file, following.total) != (piece.file, piece.total):
                    raise ClientError("it sends another file than it announced")
                have = self._added(inbox, following, part.file, have)
        whole = inbox.whole(piece.file)
        if whole is None:
            raise ClientError("it announced another file than it sent")
        return whole

    def _added(self, inbox: Inbox, piece: Piece, file: Path, have: int) -> int:
        """Add a part that follows ``have`` bytes, and return how many are there now; a short one costs its site's turn.

        Raises:
            ClientError: If it is not the whole of what was asked for.
        """
        now = inbox.add(piece, file)
        if now < min(have + self.terms.part_bytes, piece.total):
            raise ClientError("it sends less of a file than it was asked for")
        return now

    def _last(self, bundle: Bundle) -> int:
        size = self.terms.part_bytes
        return max(0, (bundle.size - 1) // size * size)

    def _opened(self) -> Courier:
        if self._courier is None:
            self._courier = self._connect()
            self._openings += 1
        return self._courier

    def _reconnect(self, error: CourierError) -> None:
        """Open the courier again.

        Raises:
            CourierError: If it cannot be opened within the time that a site may be away.
        """
        _log.warning("courier: %s; connecting again", error)
        until = time.monotonic() + self.terms.wait_s
        while True:
            self.close()
            try:
                self._look(force=True)
                return
            except CourierError:
                if time.monotonic() > until:
                    raise
                time.sleep(_AGAIN_S)

    def _look(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._looked > _LOOK_S:
            self._nodes = {node.name: node for node in self._opened().nodes() if node.name}
            self._looked = now

    def _give_up(self, left: dict[str, _Asked], limit: float) -> Iterator[Came]:
        """Yield the sites that are not waited for any more."""
        now = time.monotonic()
        for site, asked in list(left.items()):
            node = self._nodes.get(site)
            away = node is None or not node.online  # those that are away may not even be listed
            if not away and not asked.refused:
                asked.away_since = None
            elif asked.away_since is None:
                asked.away_since = now
            why = ""
            if asked.away_since is not None and now - asked.away_since > self.terms.wait_s and not asked.message:
                why = asked.refused or f"it was not online within engine.wait_s of {self.terms.wait_s:g} s"
            elif now > limit:
                why = "it did not answer in time"
            if why:
                del left[site]
                yield self._lost(site, why)

    def _push(self, left: Mapping[str, _Asked], ttl_s: float) -> None:
        """Send the messages of those that are online, of the same bytes as many at once as one line holds."""
        now, groups = time.monotonic(), dict[tuple[int, int], list[str]]()
        told = Counter[int]()
        for site, asked in left.items():
            node = self._nodes.get(site)
            if asked.message is None and node is not None and node.online and now >= asked.not_before:
                told[id(asked.payload)] += asked.size
                groups.setdefault((id(asked.payload), 2 * told[id(asked.payload)] // MOST_HEAD), []).append(site)
        for sites in groups.values():
            lines = {self._nodes[site].id: left[site].line for site in sites}
            sent = self._opened().push(lines, left[sites[0]].payload, ttl_s)
            for site in sites:
                asked = left[site]
                asked.message, asked.tries = sent[self._nodes[site].id], asked.tries + (not asked.refused)
                asked.opened, asked.ping = self._openings, None
                asked.ping_at, asked.ping_again_s = now + self.terms.ping_s, 4 * self.terms.ping_s

    def _ping(self, left: Mapping[str, _Asked], ttl_s: float) -> None:
        """Send those that are silent for long a second message, which they answer after the first."""
        now = time.monotonic()
        for site, asked in left.items():
            node = self._nodes.get(site)
            if asked.message is not None and now >= asked.ping_at and node is not None and node.online:
                asked.ping = self._opened().push({node.id: {"kind": "ping"}}, NOTHING, ttl_s)[node.id]
                asked.ping_at, asked.ping_again_s = now + asked.ping_again_s, 4 * asked.ping_again_s

    def _is_over(self, asked: _Asked) -> bool:
        """Return whether a site has answered the ping: it takes one message after the other, so it has done the first.

        The courier loses messages and replies without a word, where a connection breaks in the middle of one.
        """
        if asked.ping is None:
            return False
        pong = self._opened().pull(asked.ping, self.folder / "pong", most=0)
        if pong.state != "none":
            asked.ping = None
        return pong.state == "reply"

    def _pull(self, left: dict[str, _Asked], file: Path, most: int) -> Iterator[Came]:
        """Look for replies one at a time, so that never more than one lies in memory."""
        for site, asked in list(left.items()):
            courier = self._opened()
            if asked.opened != self._openings:
                asked.message = None
            if asked.message is None:
                continue
            is_over = self._is_over(asked)
            reply = courier.pull(asked.message, file, most=most)
            if reply.state == "none":
                if not is_over:
                    continue
                reply = REPLY_LOST
            asked.message = None
            if reply.state == "error":
                why = LOST.get(reply.code)
                if why is None or asked.tries >= self.terms.attempts:
                    del left[site]
                    tried = f" ({asked.tries} tries)" if asked.tries > 1 else ""
                    yield self._lost(site, f"{why or _ERRORS.get(reply.code, f'error {reply.code}')}{tried}")
                else:
                    _log.warning("site %r: %s; its message is sent again", site, why)
                    asked.not_before, asked.refused = time.monotonic() + _AGAIN_S, ""
            elif reply.head.get("error") in _AGAIN and "have" not in reply.head:
                asked.refused, asked.not_before = told(reply.head) or "", time.monotonic() + _AGAIN_S
                asked.away_since = asked.away_since or time.monotonic()
                if time.monotonic() - asked.away_since > self.terms.wait_s:
                    del left[site]
                    yield self._lost(site, asked.refused)
            else:
                del left[site]
                lost = None if "have" in reply.head else told(reply.head)
                yield Came(site, reply.head, file, lost)

    def _lost(self, site: str, why: str) -> Came:
        return Came(site, {}, self.folder / "answer", why)


def _size_of(line: Head) -> int:
    return len(json.dumps(json.dumps(line)))


def _piece(bundle: Bundle, offset: int, part: Source) -> dict[str, Any]:
    return {"file": bundle.sha256, "total": bundle.size, "offset": offset, "part": sha256(part)}

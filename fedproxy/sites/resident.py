"""The process at a data owner that serves the server's messages: it alone opens the rows, and its policy decides."""

import errno
import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fedproxy
from fedproxy.errors import ClientError, FedProxyError, one_line
from fedproxy.files import private_folder
from fedproxy.sites.policy import NotAllowedError
from fedproxy.sites.site_config import SitePlace
from fedproxy.sites.site_rows import SiteRows
from fedproxy.sites.site_run import Answered, ChangedRowsError, SiteRun, reason
from fedproxy.wire.bundle import unpack
from fedproxy.wire.frames import NOTHING, Head, Source, sha256
from fedproxy.wire.inbox import Inbox, Piece, is_hash
from fedproxy.wire.messages import PROTOCOL, Ask, Greeting, Refusal, Setup, Train, is_whole, refusal, run_id

_log = logging.getLogger(__name__)
Reply = tuple[Head, Source]
MOST_PART = 512 << 20
"""Most bytes of a part of a file."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class RefusedError(Exception):
    """What is asked is not done; its words go to the server.

    Args:
        kind: One of the words that a site may say.
        why: More, in words of this package that quote no row.
    """

    def __init__(self, kind: Refusal, why: str = "") -> None:
        super().__init__(why or kind)
        self.kind: Refusal = kind
        self.why = why


class Resident:
    """Serves one site's messages.

    Args:
        place: The site.
        rows: Its rows.
    """

    def __init__(self, place: SitePlace, rows: SiteRows) -> None:
        self.place, self.config, self.rows = place, place.config, rows
        self.folder = private_folder(place.folder)
        self.inbox = Inbox(self.folder / "inbox")
        self._run: tuple[str, SiteRun] | None = None
        self._works, self._files = threading.Lock(), threading.Lock()
        self._held = Counter[str]()

    def serve(self, head: Head, payload: Path) -> Reply:
        """Do what a message asks; whatever goes wrong is told in one of a few words.

        Args:
            head: The message's line.
            payload: The bytes that came with it.
        """
        began, kind = time.monotonic(), head.get("kind")
        try:
            reply = self._do(head, payload)
            said = "done"
        except RefusedError as error:
            reply, said = (refusal(error.kind, error.why), NOTHING), str(error)
        except NotAllowedError as error:
            reply, said = (refusal("refused", str(error)), NOTHING), str(error)
        except ChangedRowsError:
            reply, said = (refusal("changed"), NOTHING), "rows changed since the run began"
        except OSError as error:
            word: Refusal = "full" if error.errno in _FULL else "failed"
            reply, said = (refusal(word, error.strerror or ""), NOTHING), str(error)
        except FedProxyError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
            reply, said = (refusal("full") if full else refusal("failed", reason(error)), NOTHING), str(error)
        except Exception as error:
            _log.exception("a message could not be served")
            reply, said = (refusal("failed", type(error).__name__), NOTHING), repr(error)
        self._note(head, one_line(kind, 20), said, time.monotonic() - began, reply[1].size)
        return reply

    def close(self) -> None:
        """End the workers."""
        if self._run is not None:
            self._run[1].close()

    def _do(self, head: Head, payload: Path) -> Reply:
        match head.get("kind"):
            case "hello":
                return self._hello(head)
            case "ping":
                return {}, NOTHING
            case "put":
                return {"have": self._add(head, payload)}, NOTHING
            case "train":
                return self._train(head, payload)
            case "ask":
                return self._ask(head, payload)
            case "get":
                return self._get(head)
        raise RefusedError("unknown", "its FedProxy does not know this kind of message")

    def _hello(self, head: Head) -> Reply:
        if head.get("protocol") != PROTOCOL or head.get("version") != fedproxy.__version__:
            theirs = one_line(head.get("version", "unknown"), 40)
            raise RefusedError("version", f"FedProxy {fedproxy.__version__} here, {theirs} at the server")
        name, have = run_id(head.get("run")), 0
        if head.get("setup") is not None:
            setup = Setup.parse(head["setup"])
            self.config.policy.check_setup(setup)
            with self._files:
                proxy = self._proxy(setup)
                have = setup.proxy_bytes if proxy is not None else self.inbox.have(setup.proxy)
                self._set_up(self._entered(name), setup, proxy)
        greeting = Greeting(dict(self.rows), fedproxy.__version__, time.time(), have, self.rows.converse)
        return {"greeting": vars(greeting)}, NOTHING

    def _entered(self, name: str) -> SiteRun:
        """Return the run of this name; another one that is served now ends, unless its clients are at work."""
        if self._run is not None and self._run[0] != name:
            with self._working(0.0):
                self._run[1].close()
                self._run = None
        if self._run is None:
            runs = private_folder(self.folder / "runs")
            self._run = name, SiteRun(runs / name, self.config, self.rows)
            (runs / name).touch()
            old = sorted((path for path in runs.iterdir() if path.name != name), key=lambda path: path.stat().st_mtime)
            for path in old[: max(0, len(old) - self.config.keep_runs + 1)]:
                shutil.rmtree(path, ignore_errors=True)
        return self._run[1]

    def _set_up(self, run: SiteRun, setup: Setup, proxy: Path | None) -> None:
        if not run.is_set_up(setup, proxy):
            with self._working(0.0):
                run.set_up(setup, proxy)

    def _entered_already(self, head: Head) -> SiteRun:
        """Return the run that a message is of; after a restart of this process it is entered again."""
        name = run_id(head.get("run"))
        if self._run is None or self._run[0] != name:
            if not (self.folder / "runs" / name).is_dir():
                raise RefusedError("unknown", "say hello first")
            with self._files:
                run = self._entered(name)
                setup = run.setup_before()
                if setup is not None:
                    self.config.policy.check_setup(setup)
                    self._set_up(run, setup, self._proxy(setup))
        entered = self._run
        if entered is None or not entered[1].is_ready:
            raise RefusedError("unknown", "the proxy has not arrived; say hello first")
        return entered[1]

    def _proxy(self, setup: Setup) -> Path | None:
        """Return the folder of a proxy that has arrived."""
        folder = private_folder(self.folder / "proxies") / setup.proxy
        if folder.is_dir():
            return folder
        whole = self.inbox.whole(setup.proxy)
        if whole is None:
            return None
        part = folder.with_name(f".{setup.proxy}")
        shutil.rmtree(part, ignore_errors=True)
        unpack(whole, part)
        for other in folder.parent.iterdir():
            if other != part:
                shutil.rmtree(other, ignore_errors=True)
        part.rename(folder)
        self.inbox.drop(setup.proxy)
        return folder

    def _add(self, head: Head, payload: Path) -> int:
        """Take in a part of a file; where a file begins, others go that nothing needs."""
        if not (self.folder / "runs" / run_id(head.get("run"))).is_dir():
            raise RefusedError("unknown", "say hello first")
        try:
            piece = Piece.parse(head.get("piece"), most=self.config.policy.most_bytes)
            with self._files:
                if (self.folder / "proxies" / piece.file).is_dir():
                    return piece.total
                if not self.inbox.have(piece.file):
                    wanted = self._run and self._run[1].wanted
                    self.inbox.sweep({piece.file, *list(self._held), *([wanted] if wanted else [])})
                return self.inbox.add(piece, payload)
        except ClientError as error:
            raise RefusedError("damaged", str(error)) from error

    def _train(self, head: Head, payload: Path) -> Reply:
        run, task = self._entered_already(head), Train.parse(head.get("task"))
        with self._brought(task.bundle, head, payload) as bundle, self._working(task.seconds) as left:
            answered = run.train(task, bundle, left)
        with self._files:
            self.inbox.sweep({task.bundle, *list(self._held)})
        return self._reply(answered, head)

    def _ask(self, head: Head, payload: Path) -> Reply:
        run, asked = self._entered_already(head), Ask.parse(head.get("question"))
        brought: AbstractContextManager[Path | None] = nullcontext()
        if asked.bundle is not None:
            brought = self._brought(asked.bundle, head, payload)
        with brought as bundle, self._working(asked.seconds) as left:
            return self._reply(run.ask(asked, bundle, left), head)

    @contextmanager
    def _brought(self, file: str, head: Head, payload: Path) -> Iterator[Path]:
        """Hold a bundle whose last part a message brings, and tell where it lies."""
        self._held[file] += 1
        try:
            self._add(head, payload)
            bundle = self.inbox.whole(file)
            if bundle is None:
                raise RefusedError("damaged", "what goes with the message has not arrived whole")
            yield bundle
        finally:
            self._held -= Counter([file])

    @contextmanager
    def _working(self, seconds: float) -> Iterator[float]:
        """Hold the workers, of which another message may have to be done with first; tell how many seconds are left."""
        began = time.monotonic()
        if not self._works.acquire(timeout=seconds):
            raise RefusedError("busy")
        try:
            yield max(0.0, seconds - (time.monotonic() - began))
        finally:
            self._works.release()

    def _reply(self, answered: Answered, head: Head) -> Reply:
        """Return answers with the first part of their files."""
        said: Head = {"answers": answered.answers, "piece": None}
        bundle = answered.bundle
        if bundle is None:
            return said, NOTHING
        part = bundle.part(0, _part_bytes(head.get("part")))
        piece = Piece(bundle.sha256, bundle.size, 0, sha256(part))
        return {**said, "piece": vars(piece)}, part

    def _get(self, head: Head) -> Reply:
        run, file, offset = self._entered_already(head), head.get("file"), head.get("offset")
        bundle = run.answered(str(file)) if is_hash(file) else None
        if bundle is None or type(offset) is not int or not 0 <= offset < bundle.size:
            raise RefusedError("unknown", "there is no such part of a file")
        part = bundle.part(offset, _part_bytes(head.get("length")))
        return {"piece": vars(Piece(bundle.sha256, bundle.size, offset, sha256(part)))}, part

    def _note(self, head: Head, kind: str, said: str, seconds: float, sent: int) -> None:
        """Add a line to the owner's journal: what was asked, and what left."""
        task = head.get("task")
        round_ = task.get("round") if isinstance(task, dict) else None
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run": one_line(head.get("run", ""), 32),
            "kind": kind,
            "round": round_ if is_whole(round_) else None,
            "seconds": round(seconds, 2),
            "sent_bytes": sent,
            "outcome": one_line(said),
        }
        _log.info(
            "%s %s%s: %s", kind, line["run"][:8], f" round {line['round']}" if line["round"] else "", line["outcome"]
        )
        try:
            with open(self.folder / "journal.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            _log.warning("journal.jsonl cannot be written: %s", error.strerror)


def _part_bytes(said: object) -> int:
    if type(said) is not int or not 0 < said <= MOST_PART:
        raise RefusedError("unknown", "a message does not say how large parts are")
    return said

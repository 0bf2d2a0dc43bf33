"""One run at a site: its setup, its workers, what its clients remember, and the latest answers."""

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError, ClientError, FedProxyError, one_line
from fedproxy.federation.client.setup import LocalSetup
from fedproxy.federation.engines.pool import WorkerPool
from fedproxy.federation.engines.workers import Workers
from fedproxy.files import private_folder, read_json, write_json
from fedproxy.messages import Answer, Answers, Collect, Done, Dropped, Evaluate, Facts, Message, Sums, UpdateFile
from fedproxy.privacy.ledger import FOLDER as LEDGER
from fedproxy.privacy.registration import FOLDER as SIGNING
from fedproxy.protocol import Broadcast, ClientUpdate, Kept
from fedproxy.sealed_tensors import tensors_sha256
from fedproxy.seeding import ClientSeeds
from fedproxy.sites.policy import NotAllowedError, Policy
from fedproxy.sites.site_config import SiteConfig
from fedproxy.sites.site_rows import SiteRows
from fedproxy.sites.trained_rounds import TrainedRounds
from fedproxy.wire.bundle import Bundle, unpack
from fedproxy.wire.messages import Ask, Setup, Train

_START_S = 300.0
_PATH = re.compile(r"(?<![\w./])/[^\s'\",;:()]+")
_KEPT_ANSWERS = 2


class ChangedRowsError(Exception):
    """The site's rows are others than those that the run began with."""


class SiteRun:
    """A run that this site takes part in.

    Args:
        folder: What the site keeps of the run.
        config: The site.
        rows: Its rows.

    Raises:
        ChangedRowsError: If the run began with other rows.
    """

    def __init__(self, folder: Path, config: SiteConfig, rows: SiteRows) -> None:
        self.folder, self.config, self.rows = private_folder(folder), config, rows
        self.trained = TrainedRounds(rows.folder.parent)
        self._setup: Setup | None = None
        self._proxy: Path | None = None
        self._sites: WorkerPool | None = None
        note = self.folder / "run.json"
        if not note.exists():
            write_json(note, {"rows": rows.sha256})
        elif read_json(note, dict).get("rows") != rows.sha256:
            raise ChangedRowsError

    @property
    def policy(self) -> Policy:
        """What is allowed."""
        return self.config.policy

    def set_up(self, setup: Setup, proxy: Path | None) -> None:
        """Take note of how clients are made; workers start when they are first needed.

        Args:
            setup: What the server says.
            proxy: Folder of the proxy; None while it has not arrived.
        """
        if not self.is_set_up(setup, proxy):
            self.close()
            write_json(self.folder / "setup.json", asdict(setup))
        self._setup, self._proxy = setup, proxy

    def is_set_up(self, setup: Setup, proxy: Path | None) -> bool:
        """Return whether clients are made in just this way."""
        return (setup, proxy) == (self._setup, self._proxy)

    @property
    def wanted(self) -> str:
        """Hash of the proxy that clients are made of; empty where nothing has been said of it."""
        return "" if self._setup is None else self._setup.proxy

    def setup_before(self) -> Setup | None:
        """Return how clients were made when this process, or one before it, was last told."""
        note = self.folder / "setup.json"
        return Setup.parse(read_json(note, dict)) if note.exists() else None

    @property
    def is_ready(self) -> bool:
        """Whether clients can be made."""
        return self._setup is not None and self._proxy is not None

    def train(self, task: Train, bundle: Path, seconds: float) -> "Answered":
        """Train clients, or return what they answered when the same was asked before.

        Args:
            task: What to do.
            bundle: The files that they start from.
            seconds: How long all of it may take, beside the workers' start.
        """
        known = Answered.find(self.folder / "answers", _key({**asdict(task), "seconds": 0}))
        if known.is_whole:
            return known
        places: dict[int, list[str]] = {}
        for client, place in task.files.items():
            places.setdefault(place, []).append(client)
        known.begin()
        until = time.monotonic() + seconds + (_START_S if self._sites is None else 0.0)
        with self._unpacked(bundle) as files:
            sent = [Broadcast.load(file) for file in files]
            whole = _key({**asdict(task), "seconds": 0, "bundle": [_content(broadcast) for broadcast in sent]})
            for place, clients in places.items():
                left = max(0.0, min(seconds, until - time.monotonic()))
                self._train(known, task, whole, sent[place] if place < len(sent) else None, clients, left)
        return known.finish()

    @contextmanager
    def _unpacked(self, bundle: Path | None) -> Iterator[list[Path]]:
        scratch = self.folder / "asked"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            yield [] if bundle is None else unpack(bundle, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _train(
        self,
        answers: "Answered",
        task: Train,
        content: str,
        broadcast: Broadcast | None,
        clients: list[str],
        seconds: float,
    ) -> None:
        if broadcast is None:
            raise ClientError("the task names a file that its bundle does not hold")
        if broadcast.round != task.round:
            raise ClientError("the broadcast is of another round than the task")
        self.policy.check_round(task.round, broadcast.job)
        self.trained.note(f"{self.folder.name}_{content}", self.policy)
        own = {client: broadcast.with_own(task.own[client]) for client in clients}
        seeds: dict[str, ClientSeeds] = {name: sent.seeds for name, sent in own.items() if sent.seeds is not None}
        kept: dict[str, Kept] = {name: sent.kept for name, sent in own.items()}
        whole = replace(broadcast, all_seeds=seeds, all_kept=kept)
        known = [client for client in clients if client in self.rows]
        answers.take(self._unknown(clients))
        with closing(self._opened().run(whole, known, timeout_s=seconds)) as found:
            answers.take(found, self.policy)

    def ask(self, asked: Ask, bundle: Path | None, seconds: float) -> "Answered":
        """Ask clients something outside of rounds.

        Args:
            asked: What each is asked.
            bundle: The tensors that go with it.
            seconds: How long it may take, beside the workers' start.

        Raises:
            NotAllowedError: If the policy does not allow it.
        """
        answers = Answered.find(self.folder / "answers", _key(asdict(asked)))
        answers.begin()
        answers.take(self._unknown(asked.messages))
        with self._unpacked(bundle) as files:
            tensors = Broadcast.load(files[0]).extras if files else {}
            known = {name: said for name, said in asked.messages.items() if name in self.rows}
            messages = {name: Message.of(said, tensors) for name, said in known.items()}
            self._check(messages.values())
            with closing(self._opened().ask(messages, timeout_s=seconds)) as found:
                answers.take(found, self.policy)
        return answers.finish()

    def _check(self, messages: Iterable[Message]) -> None:
        if not self.policy.personal and any(isinstance(message, Collect) for message in messages):
            raise NotAllowedError("policy.personal does not let personal tensors leave")
        if self.policy.most_clip is not None and any(isinstance(message, Collect) for message in messages):
            raise NotAllowedError("policy.most_clip lets no personal tensors leave, which nothing clips")
        if not self.policy.evaluate and any(isinstance(message, Evaluate) for message in messages):
            raise NotAllowedError("policy.evaluate does not let the site be evaluated on")

    def _unknown(self, clients: Iterable[str]) -> list[Dropped]:
        return [Dropped(client, "this site has no such client") for client in clients if client not in self.rows]

    def answered(self, file: str) -> Bundle | None:
        """Return the bundle of latest answers that has this hash."""
        for folder in (self.folder / "answers").glob("*"):
            bundle = Answered(folder).bundle
            if bundle is not None and bundle.sha256 == file:
                return bundle
        return None

    def close(self) -> None:
        """End the workers."""
        sites, self._sites = self._sites, None
        if sites is not None:
            sites.close()

    def _opened(self) -> WorkerPool:
        if self._setup is None or self._proxy is None:
            raise ClientError("the proxy has not arrived")
        if self._sites is None:
            setup, config = self._setup, self.config
            local = LocalSetup(
                proxy=str(self._proxy.absolute()),
                dtype=setup.dtype,
                trainable=setup.trainable,
                rows=str(self.rows.folder.absolute()),
                store=str((self.folder / "store").absolute()),
                max_input_tokens=setup.max_input_tokens,
                max_target_tokens=setup.max_target_tokens,
                trainer=config.trainer,
                long_rows=setup.long_rows,
                quantization=setup.quantization,
                ledger=str((self.rows.folder.parent / LEDGER).absolute()),
                signing=str((self.rows.folder.parent / SIGNING).absolute()),
                logs=str((self.folder / "trainer").absolute()),
            )
            engine = Workers(workers=config.workers, threads=config.threads, start_timeout_s=_START_S)
            self._sites = engine.start(_no_client_here, local.remote(setup.plugins), self.folder / "exchange")
        return self._sites


class Answered:
    """Answers of some clients, kept until others are asked for: whoever asks again is answered the same.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Any] = {}
        if self.is_whole:
            self.answers = read_json(self._table, dict)

    @classmethod
    def find(cls, folder: Path, key: str) -> "Answered":
        """Return the answers to what has this key, and forget all but the latest."""
        found = cls(private_folder(folder) / key)
        others = sorted((p for p in folder.iterdir() if p.name != key), key=lambda path: path.stat().st_mtime)
        for old in others[: max(0, len(others) - _KEPT_ANSWERS + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return found

    @property
    def _table(self) -> Path:
        return self.folder / "answers.json"

    @property
    def is_whole(self) -> bool:
        """Whether all of them are there."""
        return self._table.is_file()

    @property
    def bundle(self) -> Bundle | None:
        """The files that answer; None where there are none."""
        names = [said["file"] for said in self.answers.values() if "file" in said]
        return Bundle({name: self.folder / name for name in sorted(names)}) if names else None

    def begin(self) -> None:
        """Make an empty folder; what was answered before is forgotten."""
        self.answers = {}
        shutil.rmtree(self.folder, ignore_errors=True)
        private_folder(self.folder)

    def take(self, found: "Answers | list[Dropped]", policy: Policy | None = None) -> None:
        """Take answers in, as far as the policy lets them leave.

        Args:
            found: The answers.
            policy: What may leave.
        """
        for answer in found:
            self.answers[answer.client_id] = self._taken(answer, policy or Policy())

    def _taken(self, answer: Answer, policy: Policy) -> Mapping[str, Any]:
        if isinstance(answer, Dropped):
            return {"dropped": one_line(without_paths(answer.reason))}
        if isinstance(answer, Done):
            return {"done": True}
        if isinstance(answer, Facts):
            return {"says": answer.plain()}
        if isinstance(answer, Sums):
            return _summed(answer, policy)
        name = f"{len(self.answers):05d}"
        try:
            update = ClientUpdate.load(answer.path) if isinstance(answer, UpdateFile) else answer
            allowed = policy.allowed(update)
        except NotAllowedError as error:
            return {"dropped": f"its site's {error}"}
        if isinstance(answer, UpdateFile) and allowed is update:
            shutil.move(answer.path, self.folder / name)
        else:
            allowed.save(self.folder / name)
        if (self.folder / name).stat().st_size > policy.most_bytes:
            (self.folder / name).unlink()
            return {"dropped": f"its site's policy.largest_mib is {policy.largest_mib}, its update has more"}
        return {"file": name}

    def finish(self) -> "Answered":
        """Note that all are there."""
        write_json(self._table, self.answers)
        return self


def _summed(sums: Sums, policy: Policy) -> Mapping[str, Any]:
    """Return sums over enough rows."""
    least = min((count for found in sums.by_state.values() for _, count in found.values()), default=0)
    if least < policy.least_held_out:
        return {"dropped": f"its site's policy.least_held_out is {policy.least_held_out}, fewer rows are summed up"}
    return {"says": sums.plain()}


def reason(error: Exception) -> str:
    """Return what the server is told of an error of this package; others may quote rows and are told by kind."""
    if isinstance(error, CheckpointError | ClientError):
        return one_line(without_paths(str(error)))
    return type(error).__name__ if not isinstance(error, FedProxyError) else "its site cannot do this; see its log"


def without_paths(text: str) -> str:
    """Return a text with the last names alone of this machine's paths."""
    return _PATH.sub(lambda found: Path(found[0]).name, text)


def _content(broadcast: Broadcast) -> str:
    """Return a hash of what a broadcast says; files that say the same may differ in the order of their metadata."""
    groups = {"state": broadcast.state, **{f"extras/{name}": group for name, group in broadcast.extras.items()}}
    tensors = {f"{group}/{name}": tensor for group, own in groups.items() for name, tensor in own.items()}
    return tensors_sha256(tensors, {"round": str(broadcast.round), "job": json.dumps(broadcast.job, sort_keys=True)})


def _key(said: Mapping[str, Any]) -> str:
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _no_client_here() -> Any:
    raise AssertionError("workers make clients in processes of their own")

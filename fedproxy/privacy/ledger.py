"""What was released of a client's data, over all rounds and runs: a file beside the data, written before each release.

One release has one charge and one key, from which its noise is drawn: 32 random bytes that the ledger notes with the
charge, before training, and forgets once the release is on the disk. So no two releases ever share noise:

- Until there is a release, nothing has left the client. Whoever asks the same again, as a run does that was killed,
  gets another try under the same charge and key.
- As soon as there is one, whoever asks the same again gets that very release (:mod:`fedproxy.privacy.releases`), which
  costs nothing: the client does not train again. If its file is damaged or gone there is a new charge, with a new key.
- Whoever asks for anything else is charged, and gets other noise.
"""

import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedproxy.errors import CheckpointError, ClientError, ConfigError
from fedproxy.files import private_folder
from fedproxy.names import file_stem
from fedproxy.privacy.accounting import Release, calibrate, spent
from fedproxy.privacy.noise import KEY_BYTES
from fedproxy.sealed import read_sealed, write_sealed

FOLDER = ".privacy_ledger"
"""Name of the folder of ledgers beside a client's data."""
_FORMAT = "fedproxy-ledger-2"
_READ = ("fedproxy-ledger-1", _FORMAT)
"""Formats that are read; what an older one holds was released, and its noise is never drawn again."""
_REMEDY = "put back a copy of it: without it nobody knows what was released of these rows"
_WAIT_S = 600.0
"""Charges of all clients of a folder wait for each other; one that finds its noise takes seconds."""
_OTHER_RUNS = 2
"""Other runs whose latest release stays."""
_SLACK = 1e-9
"""Relative difference between two computations of one epsilon."""


@dataclass(frozen=True)
class Terms:
    """The budget that a run asks for, and how it spends it."""

    run: str
    """Tells the rounds of a run from those of another."""
    unit: str
    epsilon: float | None
    """Budget over all runs; None is no bound."""
    delta: float | None
    """None where there is no noise."""
    accountant: str
    planned: Release
    """What a round releases; its noise multiplier is 0 where the least that keeps the budget is to be found."""
    rounds: int
    """Rounds in which the client takes part at most."""


@dataclass(frozen=True)
class Charge:
    """What a round costs a client."""

    release: Release
    epsilon: float
    """Spent with this round, over all runs."""
    number: int
    """Of the charge, in its ledger, from 0."""
    key: bytes
    """From which the release's noise is drawn; empty where it is made already."""
    made: str
    """Seal of the release, where it is made already."""
    releases: int
    """How many releases the ledger holds."""


class Ledger:
    """One client's ledger.

    Args:
        folder: The folder of ledgers; made when something is written.
        client_id: The client.
    """

    def __init__(self, folder: Path, client_id: str) -> None:
        self.folder, self.client_id = folder, client_id
        self.path = folder / f"{file_stem(client_id)}.json"

    def charge(
        self, terms: Terms, round_: int, request: str, *, known: int = 0, key: bytes = b"", anew: bool = False
    ) -> Charge:
        """Note a round's release before it is made, unless it was noted before for the same request.

        Args:
            terms: Budget and plan.
            round_: The round.
            request: A hash of what was asked for.
            known: Releases that the client remembers elsewhere: a ledger that holds fewer was taken away.
            key: From which noise is drawn if this is a new charge; empty draws one from the operating system.
            anew: Whether a release that was made for this request cannot be used any more.

        Raises:
            ClientError: If the budget does not allow it, the noise would be lower than before, the unit is another,
                or the ledger is not the one that the client knows.
            CheckpointError: If a ledger is damaged or cannot be written.
        """
        with self._held():
            content = self._read()
            entries: list[dict[str, Any]] = content["entries"]
            if len(entries) < known:
                raise ClientError(
                    f"{self.path} holds {len(entries)} releases of client {self.client_id!r}, which has made {known}; "
                    f"{_REMEDY}"
                )
            number, others = _latest(entries, terms.run, round_, request), self._other_runs(content, terms)
            if number is None or (anew and "made" in entries[number]):
                release, noise = self._allowed(content, terms, others), key or secrets.token_bytes(KEY_BYTES)
                number, said = len(entries), {"run": terms.run, "round": round_, "request": request}
                entries.append({**said, "noise": noise.hex(), "release": release.plain()})
                content["unit"] = terms.unit
                write_sealed(self.path, content, private=True)
            entry = entries[number]
            return Charge(
                Release(**entry["release"]),
                _spent(content, terms, others),
                number,
                bytes.fromhex(entry.get("noise", "")),
                entry.get("made", ""),
                len(entries),
            )

    def made(self, number: int, seal: str) -> str:
        """Note that a release is on the disk, before it is sent, and forget the key of its noise.

        Returns:
            The seal of the one release that may be sent: an earlier one's, where another process was faster.

        Raises:
            CheckpointError: If the ledger is damaged or cannot be written.
        """
        with self._held():
            content = self._read()
            entry = content["entries"][number]
            if "made" not in entry:
                entry["made"] = seal
                del entry["noise"]
                write_sealed(self.path, content, private=True)
            return str(entry["made"])

    def needed(self, run: str, round_: int) -> set[int]:
        """Return the numbers of the releases that may be asked for again, a few however long the ledger is.

        Of a run that goes on from its last checkpoint, or the one before, these are this round's and the one's before;
        of the other runs that were at work last the latest.
        """
        entries = self._read()["entries"]
        latest = {entry["run"]: number for number, entry in enumerate(entries) if entry["run"] != run}
        own = {entry["round"]: number for number, entry in enumerate(entries) if entry["run"] == run}
        return {*(own[number] for number in own if number >= round_ - 1), *sorted(latest.values())[-_OTHER_RUNS:]}

    def _allowed(self, content: dict[str, Any], terms: Terms, others: Sequence[Release]) -> Release:
        """Return what the next round of a run releases.

        Raises:
            ClientError: If it may not.
        """
        mine = _by_run(content["entries"]).get(terms.run, ())
        before = [*others, *mine]
        left = terms.planned.times(max(1, terms.rounds - len(mine)))
        noise = terms.planned.noise_multiplier or self._noise(content, terms, before, left)
        release = replace(terms.planned, noise_multiplier=noise)
        least = max((entry.noise_multiplier for entry in mine), default=0.0)
        if noise < least * (1 - _SLACK):
            raise ClientError(
                f"privacy.noise_multiplier must be at least {least:.4g}, that of this run's earlier rounds, got "
                f"{noise:.4g}; a run that goes on may not lower its noise"
            )
        if terms.epsilon is not None and terms.delta is not None:
            planned = release if mine else replace(left, noise_multiplier=noise)
            self._check(spent([*before, planned], terms.delta, terms.accountant), before, terms, bool(mine))
        return release

    def _noise(self, content: dict[str, Any], terms: Terms, before: Sequence[Release], left: Release) -> float:
        """Return the noise of a run: the same in all of its rounds, unless its plan changes."""
        if terms.epsilon is None or terms.delta is None:
            return 0.0
        plan = [terms.epsilon, terms.delta, terms.accountant, terms.rounds, terms.planned.plain()]
        known = content["runs"].get(terms.run)
        if known is None or known["plan"] != plan:
            try:
                noise = calibrate(left, terms.epsilon, terms.delta, terms.accountant, tuple(before))
            except ConfigError as error:
                raise ClientError(f"{error} ({self.path})") from error
            content["runs"][terms.run] = {"plan": plan, "noise_multiplier": noise}
        return float(content["runs"][terms.run]["noise_multiplier"])

    def _check(self, total: float, before: Sequence[Release], terms: Terms, started: bool) -> None:
        assert terms.epsilon is not None, "without a budget nothing is compared"
        if total <= terms.epsilon * (1 + _SLACK):
            return
        already = spent(before, terms.delta or 0.0, terms.accountant)
        next_ = "the next round" if started else f"the {terms.rounds} planned rounds"
        raise ClientError(
            f"privacy.epsilon={terms.epsilon:g} would be exceeded: {self.path} holds {already:.3g} for these rows "
            f"(delta {terms.delta:g}), and with {next_} it would be {total:.3g}; raise privacy.epsilon, lower "
            "federation.rounds, or use other rows"
        )

    def _other_runs(self, content: Mapping[str, Any], terms: Terms) -> list[Release]:
        """Return what all other runs spent: of each the most of a client, since rows may have had another owner there.

        They are looked up at every charge: another run may be at work on the same rows.

        Raises:
            ClientError: If they protect another unit.
        """
        runs: dict[str, list[Sequence[Release]]] = {}
        names = sorted({self.path.name, *(name for name in os.listdir(self.folder) if name.endswith(".json"))})
        for name in names:
            kept = _Kept.of(content) if name == self.path.name else _kept(os.path.join(self.folder, name))
            if kept.runs and kept.unit != terms.unit:
                raise ClientError(
                    f"privacy.unit must be {kept.unit} as in the earlier releases of {self.folder / name}, got "
                    f"{terms.unit}; budgets of two units do not add up, use other rows, and another privacy.ledger"
                )
            for run, releases in kept.runs.items():
                runs.setdefault(run, []).append(releases)
        others = (run for run in sorted(runs) if run != terms.run)
        return [release for run in others for release in max(runs[run], key=lambda releases: _most(releases, terms))]

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            private_folder(self.folder)
            with FileLock(self.folder / ".lock", timeout=_WAIT_S):
                yield
        except Timeout as error:
            held = f"{self.folder} is held by another process for {_WAIT_S:g} s; end that run"
            raise CheckpointError(held) from error
        except OSError as error:
            raise CheckpointError(
                f"privacy.ledger {self.folder} cannot be written ({error.strerror or error}); choose another folder"
            ) from error

    def _read(self) -> dict[str, Any]:
        fresh = {"format": _FORMAT, "client": self.client_id, "unit": "", "entries": [], "runs": {}}
        return {**fresh, **_content(self.path), "format": _FORMAT}


def _content(path: Path) -> dict[str, Any]:
    """Return a ledger's content, nothing where there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    content = read_sealed(path, remedy=_REMEDY) or {}
    if content and content.get("format") not in _READ:
        raise CheckpointError(f"{path} is not a ledger of format {_FORMAT}; {_REMEDY}")
    if content.get("format") == _READ[0]:
        content = {name: content[name] for name in ("client", "unit", "entries", "runs")}
        content["entries"] = [{**entry, "request": "", "made": ""} for entry in content["entries"]]
    return content


@dataclass(frozen=True)
class _Kept:
    """What a ledger holds."""

    unit: str
    runs: Mapping[str, Sequence[Release]]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "_Kept":
        return cls(content.get("unit", ""), _by_run(content.get("entries", [])))


def _kept(path: str) -> _Kept:
    """Return what another client's ledger holds; it is read again where it was written since."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return _Kept("", {})
    return _kept_at(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _kept_at(path: str, *stamp: int) -> _Kept:
    return _Kept.of(_content(Path(path)))


def _by_run(entries: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Release]]:
    runs: dict[str, list[Release]] = {}
    for entry in entries:
        runs.setdefault(entry["run"], []).append(Release(**entry["release"]))
    return dict(runs)


def _latest(entries: Sequence[Mapping[str, Any]], run: str, round_: int, request: str) -> int | None:
    """Return the number of the last charge for a request; an older one's release is gone."""
    asked = [run, round_, request]
    found = [n for n, entry in enumerate(entries) if [entry["run"], entry["round"], entry["request"]] == asked]
    return found[-1] if found else None


def _spent(content: Mapping[str, Any], terms: Terms, others: Sequence[Release]) -> float:
    if terms.delta is None:
        return math.inf
    return spent([*others, *_by_run(content["entries"]).get(terms.run, ())], terms.delta, terms.accountant)


def _most(releases: Sequence[Release], terms: Terms) -> float:
    return spent(releases, terms.delta or 1e-9, terms.accountant)

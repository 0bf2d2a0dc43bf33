"""What was released of a client's data, over all rounds and runs: a file beside the data, written before each release.

A ledger also holds the client's secret, from which its noise is drawn. The noise of a release depends on the secret and
on all that the release depends on: whoever asks for the same thing twice, as a run that goes on does, gets the same
bits, which cost nothing; whoever asks for anything else is charged.
"""

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
_FORMAT = "fedproxy-ledger-1"
_REMEDY = "put back a copy of it: without it nobody knows what was released of these rows"
_WAIT_S = 60.0
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
    secret: bytes
    """Of the client alone."""
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

    def charge(self, terms: Terms, round_: int, key: str, *, known: int = 0) -> Charge:
        """Note a round's release before it is made, unless the very same one was noted before.

        Args:
            terms: Budget and plan.
            round_: The round.
            key: A hash of all that the release depends on.
            known: Releases that the client remembers elsewhere: a ledger that holds fewer was taken away.

        Raises:
            ClientError: If the budget does not allow it, the noise would be lower than before, the unit is another,
                or the ledger is not the one that the client knows.
            CheckpointError: If the ledger is damaged or cannot be written.
        """
        with self._held():
            content = self._read()
            entries: list[dict[str, Any]] = content["entries"]
            if len(entries) < known:
                raise ClientError(
                    f"{self.path} holds {len(entries)} releases of client {self.client_id!r}, which has made {known}; "
                    f"{_REMEDY}"
                )
            if not any(entry["key"] == key for entry in entries):
                release = self._allowed(content, terms)
                entries.append({"run": terms.run, "round": round_, "key": key, "release": release.plain()})
                content["unit"] = terms.unit
                write_sealed(self.path, content, private=True)
            release = Release(**next(entry for entry in entries if entry["key"] == key)["release"])
            return Charge(release, self._spent(content, terms), bytes.fromhex(content["secret"]), len(entries))

    def releases(self) -> list[Release]:
        """Return what was released, over all runs."""
        return _releases(self._read())

    def _allowed(self, content: dict[str, Any], terms: Terms) -> Release:
        """Return what the next round of a run releases.

        Raises:
            ClientError: If it may not.
        """
        if content["entries"] and content["unit"] != terms.unit:
            raise ClientError(
                f"privacy.unit must be {content['unit']} as in the earlier releases of {self.path}, got {terms.unit}; "
                "budgets of two units do not add up, use other rows"
            )
        before = [*_releases(content), *self._others(content, terms)]
        mine = [Release(**entry["release"]) for entry in content["entries"] if entry["run"] == terms.run]
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

    def _others(self, content: dict[str, Any], terms: Terms) -> list[Release]:
        """Return what earlier runs that dealt these rows out to other clients spent: of each run the most of a client.

        They are looked up once, when a run begins.
        """
        kept = content["others"].get(terms.run)
        if kept is None:
            kept = content["others"][terms.run] = [release.plain() for release in self._spent_by_others(terms)]
        return [Release(**release) for release in kept]

    def _spent_by_others(self, terms: Terms) -> Iterator[Release]:
        runs: dict[str, list[list[Release]]] = {}
        for path in sorted(self.folder.glob("*.json")):
            found = {} if path == self.path else Ledger._content(path)
            by_run: dict[str, list[Release]] = {}
            for entry in found.get("entries", []):
                by_run.setdefault(entry["run"], []).append(Release(**entry["release"]))
            for run, releases in by_run.items():
                runs.setdefault(run, []).append(releases)
        own = {entry["run"] for entry in self._read()["entries"]}
        for run in sorted(set(runs) - own - {terms.run}):
            yield from max(runs[run], key=lambda releases: _most(releases, terms))

    def _spent(self, content: Mapping[str, Any], terms: Terms) -> float:
        others = [Release(**release) for release in content["others"].get(terms.run, [])]
        releases = [*_releases(content), *others]
        return math.inf if terms.delta is None else spent(releases, terms.delta, terms.accountant)

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            private_folder(self.folder)
            with FileLock(self.path.with_suffix(".lock"), timeout=_WAIT_S):
                yield
        except Timeout as error:
            raise CheckpointError(f"{self.path} is held by another process for {_WAIT_S:g} s; end that run") from error
        except OSError as error:
            raise CheckpointError(
                f"privacy.ledger {self.folder} cannot be written ({error.strerror or error}); choose another folder"
            ) from error

    def _read(self) -> dict[str, Any]:
        fresh = {"format": _FORMAT, "client": self.client_id, "secret": secrets.token_hex(KEY_BYTES)}
        return Ledger._content(self.path) or {**fresh, "unit": "", "entries": [], "runs": {}, "others": {}}

    @staticmethod
    def _content(path: Path) -> dict[str, Any]:
        content = read_sealed(path, remedy=_REMEDY) or {}
        if content and content.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a ledger of format {_FORMAT}; {_REMEDY}")
        return content


def _releases(content: Mapping[str, Any]) -> list[Release]:
    return [Release(**entry["release"]) for entry in content["entries"]]


def _most(releases: Sequence[Release], terms: Terms) -> float:
    return spent(releases, terms.delta or 1e-9, terms.accountant)

"""What the server asks of clients beside training, what they answer, and how it reaches them.

A message is JSON, with a safetensors file where it carries tensors; it is bounded, and checked when it is read.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fedproxy.errors import ClientError, one_line
from fedproxy.protocol import Broadcast, ClientUpdate, Kept, Tensors, is_seal

_MOST = 10**9
"""Most rows or tokens of a client."""
_LARGEST = 1e15
"""Largest magnitude of a sum."""
_MOST_SUMS, _MOST_VERSIONS, _LONGEST = 64, 16, 64


@dataclass(frozen=True)
class Done:
    """A client has done what a message asked, and there is nothing to send."""

    client_id: str


@dataclass(frozen=True)
class UpdateFile:
    """An update as it came: a file that nobody has looked into; :mod:`fedproxy.federation.server.admission` does."""

    client_id: str
    """Who was asked for it."""
    path: Path


@dataclass(frozen=True)
class Dropped:
    """A client that takes no part in the round's result, and why."""

    client_id: str
    reason: str
    """One line."""


@dataclass(frozen=True)
class Facts:
    """What a client says of itself."""

    client_id: str
    rows: int
    """Its training rows."""
    target_tokens: int
    """Answer tokens of the row that has most."""
    held_out: int
    """Rows that it holds back to be evaluated on."""
    proxy: str
    """SHA-256 of the proxy that it holds, over all its files; empty where that is not a folder."""
    versions: Mapping[str, str]
    """Of the packages on which its results depend, by name."""

    def plain(self) -> dict[str, Any]:
        """Return the facts as plain values, without the name of the client that was asked."""
        return {name: value for name, value in asdict(self).items() if name != "client_id"}

    @classmethod
    def of(cls, client_id: str, said: Any) -> "Facts":
        """Return the facts that plain values are.

        Raises:
            ClientError: If they are none.
        """
        match said:
            case {
                "rows": int(rows),
                "target_tokens": int(tokens),
                "held_out": int(held_out),
                "proxy": str(proxy),
                "versions": dict(versions),
            } if (
                all(type(number) is int and 0 <= number <= _MOST for number in (rows, tokens, held_out))
                and rows > 0
                and is_seal(proxy)
                and len(versions) <= _MOST_VERSIONS
                and all(_is_short(name) and _is_short(version) for name, version in versions.items())
            ):
                shown = {one_line(name): one_line(version) for name, version in versions.items()}
                return cls(client_id, rows, tokens, held_out, proxy, shown)
        raise ClientError("what it says of itself is not rows, tokens, proxy and versions; use the server's version")


@dataclass(frozen=True)
class Sums:
    """What a client's held-out rows say of models: sums and counts alone, so that no row can be told from them."""

    client_id: str
    by_state: Mapping[str, Mapping[str, tuple[float, int]]]
    """Name of the state to metric to its sum and to how many values were summed up."""

    def plain(self) -> dict[str, Any]:
        """Return the sums as plain values."""
        return {state: {metric: list(pair) for metric, pair in found.items()} for state, found in self.by_state.items()}

    @classmethod
    def of(cls, client_id: str, said: Any, states: Sequence[str]) -> "Sums":
        """Return the sums that plain values are.

        Args:
            client_id: Who was asked.
            said: The values.
            states: The states that it was asked about.

        Raises:
            ClientError: If they are none.
        """
        if not isinstance(said, dict) or said.keys() != set(states):
            raise ClientError("its sums are not of the states that it was asked about; use the server's version")
        found = {state: _sums(metrics) for state, metrics in said.items()}
        return cls(client_id, found)


Answer = ClientUpdate | UpdateFile | Facts | Sums | Done | Dropped
Answers = Generator[Answer, None, None]
"""What clients answer; closing it stops those that still run."""


@dataclass(frozen=True)
class Message:
    """What the server asks of one client beside training; a :class:`Broadcast` asks for that."""

    kind: ClassVar[str]

    @property
    def tensors(self) -> Mapping[str, Tensors]:
        """The tensors that go with it, as a file, in named groups."""
        return {}

    def plain(self) -> dict[str, Any]:
        """Return the message as plain values, without its tensors."""
        return {"kind": self.kind, **asdict(self)}

    @abstractmethod
    def answered(self, client_id: str, says: Any, file: Path) -> Answer:
        """Return the answer that came, from what was said in words and where its file would be.

        Raises:
            ClientError: If it is none.
        """

    @staticmethod
    def of(said: Any, tensors: Mapping[str, Tensors] | None = None) -> "Message":
        """Return the message that plain values and the tensors of its file are.

        Raises:
            ClientError: If they are none.
        """
        match said:
            case {"kind": "hello"}:
                return Hello()
            case {"kind": "rewind", "round": int(number), "kept": kept, "changes": str(changes)} if is_seal(changes):
                return Rewind(number, Kept.of(kept), changes)
            case {"kind": "collect", "kept": kept}:
                return Collect(Kept.of(kept))
            case {"kind": "keys", "run": str(run), "round": int(number), "attempt": int(attempt)}:
                return Keys(run, number, attempt)
            case {"kind": "evaluate", "kept": kept} if tensors:
                return Evaluate(Kept.of(kept), tensors)
        raise ClientError("the message is none that a client of this version answers; use the same version")


@dataclass(frozen=True)
class Hello(Message):
    """Say what you are; :class:`Facts` answer."""

    kind: ClassVar[str] = "hello"

    def answered(self, client_id: str, says: Any, file: Path) -> Facts:
        """Return the client's facts."""
        return Facts.of(client_id, says)


@dataclass(frozen=True)
class Rewind(Message):
    """Go back to where you were after a round: check what you kept then, and forget what came later."""

    kind: ClassVar[str] = "rewind"

    round: int
    """The round after which the run goes on."""
    kept: Kept
    """What the client kept and goes on from."""
    changes: str = ""
    """Seal of the changes of the frozen weights that were sent up to this round; empty where there were none."""

    def answered(self, client_id: str, says: Any, file: Path) -> Done:
        """Say that it is done."""
        return Done(client_id)


@dataclass(frozen=True)
class Collect(Message):
    """Hand in your personal tensors, once, after the last round; an update whose ``delta`` they are answers."""

    kind: ClassVar[str] = "collect"

    kept: Kept
    """With which the client's last round that counts left it."""

    def answered(self, client_id: str, says: Any, file: Path) -> UpdateFile:
        """Return the file."""
        return UpdateFile(client_id, file)


@dataclass(frozen=True)
class Keys(Message):
    """Send your signed key share for a secure sum; an update whose ``delta`` it is answers."""

    kind: ClassVar[str] = "keys"

    run: str
    """Tells the run's sums from another's."""
    round: int
    attempt: int
    """How often the round was begun before."""

    def answered(self, client_id: str, says: Any, file: Path) -> UpdateFile:
        """Return the file."""
        return UpdateFile(client_id, file)


@dataclass(frozen=True)
class Evaluate(Message):
    """Score states on the rows that you hold back; :class:`Sums` answer."""

    kind: ClassVar[str] = "evaluate"

    kept: Kept
    """What the client kept: its personal tensors complete the states."""
    states: Mapping[str, Tensors]
    """Trainable states by name."""

    @property
    def tensors(self) -> Mapping[str, Tensors]:
        """The states."""
        return self.states

    def plain(self) -> dict[str, Any]:
        """Return what is said in words."""
        return {"kind": self.kind, "kept": asdict(self.kept)}

    def answered(self, client_id: str, says: Any, file: Path) -> Sums:
        """Return the client's sums."""
        return Sums.of(client_id, says, list(self.states))


Working = Callable[[int, str, float], None]
"""Takes a round, a client, and the share of its training that is done, in [0, 1]."""


def nobody(number: int, client_id: str, share: float) -> None:
    """Take no notice of how far a client has come."""


class Sites(Protocol):
    """How the server reaches clients, wherever they are; a running engine is one."""

    working: Working
    """Called now and then with how far a client's training has come, by engines that know it."""

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        """Run the clients of one round; answers come in the order in which clients finish, one for each client.

        Files of updates stay until the next round begins or the sites are closed.

        Args:
            broadcast: What every client starts from; each is sent what ``broadcast.addressed_to`` gives for it.
            client_ids: The round's clients.
            timeout_s: Seconds after which clients that have not finished are dropped; None waits for all.
        """
        ...

    def ask(self, messages: Mapping[str, Message]) -> Answers:
        """Send each client its message; answers come as in :meth:`run`.

        Raises:
            CheckpointError: If what a client kept is damaged or missing, in a simulation.
        """
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def _is_short(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


def _sums(said: Any) -> dict[str, tuple[float, int]]:
    """Return the sums of one state.

    Raises:
        ClientError: If a metric's name is long, a sum is not finite or a count is not a whole number.
    """
    if not isinstance(said, dict) or not 0 < len(said) <= _MOST_SUMS:
        raise ClientError(f"its sums must be of 1 to {_MOST_SUMS} metrics; use the server's version")
    found = {}
    for metric, pair in said.items():
        match pair:
            case [int() | float() as total, int(count)] if (
                _is_short(metric)
                and type(total) is not bool
                and type(count) is not bool
                and abs(total) <= _LARGEST
                and math.isfinite(total)
                and 0 < count <= _MOST
            ):
                found[one_line(metric)] = float(total), count
            case _:
                raise ClientError("its sums must each be a finite number and a count; use the server's version")
    return found

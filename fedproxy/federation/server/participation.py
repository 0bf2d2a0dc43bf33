"""Who takes part in a round's result: failing, late and invalid clients are dropped, each with its reason."""

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedproxy.errors import CheckpointError, ClientError, one_line
from fedproxy.federation.server.admission import Form, Vault, admit
from fedproxy.federation.server.expected import Expected
from fedproxy.federation.server.update_checks import check_update, too_long
from fedproxy.messages import Answer, Dropped, Sites, UpdateFile
from fedproxy.protocol import Broadcast, ClientUpdate

OnAnswer = Callable[[int, Answer], None]
TakeIn = Callable[[ClientUpdate], ClientUpdate]
"""Brings an update from its form on the wire to the one that rules read."""


@dataclass(frozen=True)
class Participation:
    """The round's terms, the same in every engine."""

    min_clients: int | None = None
    """Updates without which a round ends the run; None asks for all clients of the round."""
    round_timeout_s: float | None = None
    """Seconds that a round's clients have together; None waits for all."""
    max_norm_ratio: float | None = 1000.0
    """Longest update, as a multiple of the round's median norm; None checks no length."""
    expected: Expected = field(default_factory=Expected)
    """What the server knows of the updates."""
    together: bool = False
    """Whether a client that is dropped voids the round, so that nobody else is waited for."""
    folder: Path | None = None
    """Folder of the server alone, for its copies of updates that come as files; None is the system's temporary one."""

    def collect(
        self,
        engine: Sites,
        broadcast: Broadcast,
        clients: Sequence[str],
        on_answer: OnAnswer = lambda round_, answer: None,
        take_in: TakeIn = lambda update: update,
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        """Run a round's clients.

        Returns:
            The valid updates in sorted client order, and why each other client was dropped.

        Raises:
            ClientError: As soon as fewer than ``min_clients`` can be left; the message names a client and its reason.
            CheckpointError: If the server cannot copy an update.
        """
        wanted = self.min_clients or len(clients)
        round_ = _Round(broadcast, self.expected, len(clients), wanted, on_answer, take_in, Vault(self.folder))
        # closing: where too many clients are dropped, or one too many, the engine stops those that still run.
        with closing(engine.run(broadcast, clients, timeout_s=self.round_timeout_s)) as answers:
            for answer in answers:
                round_.take(answer)
                if self.together and round_.dropped:
                    break
        if self.max_norm_ratio is not None:
            round_.drop_long(self.max_norm_ratio)
        updates = [round_.updates[client] for client in sorted(round_.updates)]
        return updates, dict(sorted(round_.dropped.items()))


@dataclass
class _Round:
    broadcast: Broadcast
    expected: Expected
    asked: int
    wanted: int
    on_answer: OnAnswer
    take_in: TakeIn
    vault: Vault
    updates: dict[str, ClientUpdate] = field(default_factory=dict)
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @cached_property
    def form(self) -> Form:
        """The form of all updates, where clients share a state."""
        return Form.of(self.broadcast, self.expected)

    def take(self, answer: Answer) -> None:
        if isinstance(answer, Dropped):
            self.drop(answer)
            return
        if not isinstance(answer, ClientUpdate | UpdateFile):
            self.drop(Dropped(answer.client_id, "it answers training with something else than an update"))
            return
        sent = self.broadcast.addressed_to(answer.client_id)  # a fault in it is the server's own
        try:
            expected = self.expected.of(answer.client_id)
            form = self.form if self.broadcast.each is None else Form.of(sent, expected)
            update = self.take_in(admit(answer, form, self.vault))
            self.norms[answer.client_id] = check_update(update, sent, expected)
        except ClientError as error:
            self.drop(Dropped(answer.client_id, str(error)))
            return
        except CheckpointError:  # the server's own disk
            raise
        except Exception as error:  # a payload may be odd in ways that nobody thought of
            reason = f"its update cannot be read: {type(error).__name__}: {one_line(error)}"
            self.drop(Dropped(answer.client_id, reason))
            return
        self.updates[answer.client_id] = update
        self.on_answer(self.broadcast.round, update)
        self.require_enough()

    def drop_long(self, ratio: float) -> None:
        for part in sorted({part for client in self.updates for part in self.norms[client]}):
            norms = {client: self.norms[client][part] for client in self.updates}
            for client, reason in too_long(norms, ratio, part).items():
                self.drop(Dropped(client, reason))

    def drop(self, client: Dropped) -> None:
        """Drop a client; whoever worded the reason, it passes here on its way into records and onto the screen."""
        reason = one_line(client.reason)
        self.updates.pop(client.client_id, None)
        self.dropped[client.client_id] = reason
        self.on_answer(self.broadcast.round, Dropped(client.client_id, reason))
        self.require_enough()

    def require_enough(self) -> None:
        """End the round if too few clients are left.

        While all have failed, and alike, the next one is waited for: where nobody can train it is not a client's fault.
        """
        left, number = self.asked - len(self.dropped), self.broadcast.round
        if left >= self.wanted:
            return
        alike = not self.updates and len(set(map(self.kind, self.dropped))) == 1 and not self.late()
        if alike and left:
            return
        if alike and len(self.dropped) > 1:
            reason = self.dropped[min(self.dropped)].removesuffix("; lower client.lr")
            raise ClientError(
                f"all {self.asked} clients of round {number} failed alike, so that the state they were sent, or how "
                f"they train, is to blame and no client: {reason}; lower client.lr or change the trainer.* keys in "
                f"another output_dir, or delete the checkpoint of round {number - 1} and use resume=auto"
            )
        *before, client = self.dropped
        also = f" (dropped before it: {one_line(', '.join(sorted(before)))})" if before else ""
        raise ClientError(
            f"client {client!r} failed in round {number}: {self.dropped[client]}; that leaves {left} of {self.asked} "
            f"clients{also}, and federation.min_clients asks for {self.wanted}; fix the client or lower "
            f"federation.min_clients, then resume=auto"
        )

    def late(self) -> bool:
        """Return whether a client was too slow, which says nothing about what it was sent."""
        return any(reason.startswith("late:") for reason in self.dropped.values())

    def kind(self, client: str) -> str:
        """Return why a client was dropped, without its name, its log and numbers."""
        return re.sub(r"[-+.\d]+|log \S+", "#", self.dropped[client].replace(client, ""))

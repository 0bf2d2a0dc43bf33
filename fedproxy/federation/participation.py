"""Who takes part in a round's result: failing, late and invalid clients are dropped, each with its reason."""

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.engines.base import Answer, Dropped, RunningEngine
from fedproxy.federation.expected import Expected
from fedproxy.federation.update_checks import check_update, too_long
from fedproxy.protocol import Broadcast, ClientUpdate

OnAnswer = Callable[[int, Answer], None]


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

    def collect(
        self,
        engine: RunningEngine,
        broadcast: Broadcast,
        clients: Sequence[str],
        on_answer: OnAnswer = lambda round_, answer: None,
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        """Run a round's clients.

        Returns:
            The valid updates in sorted client order, and why each other client was dropped.

        Raises:
            ClientError: As soon as fewer than ``min_clients`` can be left; the message names a client and its reason.
        """
        round_ = _Round(broadcast, self.expected, len(clients), self.min_clients or len(clients), on_answer)
        # closing: where too many clients are dropped, the engine stops those that still run.
        with closing(engine.run(broadcast, clients, timeout_s=self.round_timeout_s)) as answers:
            for answer in answers:
                round_.take(answer)
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
    updates: dict[str, ClientUpdate] = field(default_factory=dict)
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def take(self, answer: Answer) -> None:
        if isinstance(answer, Dropped):
            self.drop(answer)
            return
        sent = self.broadcast.addressed_to(answer.client_id)  # a fault in it is the server's own
        try:
            self.norms[answer.client_id] = check_update(answer, sent, self.expected)
        except ClientError as error:
            self.drop(Dropped(answer.client_id, one_line(error)))
            return
        except Exception as error:  # a payload may be odd in ways that nobody thought of
            reason = f"its update cannot be read: {type(error).__name__}: {one_line(error)}"
            self.drop(Dropped(answer.client_id, reason))
            return
        self.updates[answer.client_id] = answer
        self.on_answer(self.broadcast.round, answer)
        self.require_enough()

    def drop_long(self, ratio: float) -> None:
        for part in ("", *sorted(self.expected.extras)):
            norms = {client: self.norms[client][part] for client in self.updates}
            for client, reason in too_long(norms, ratio, part).items():
                self.drop(Dropped(client, reason))

    def drop(self, client: Dropped) -> None:
        self.updates.pop(client.client_id, None)
        self.dropped[client.client_id] = client.reason
        self.on_answer(self.broadcast.round, client)
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
            raise ClientError(
                f"all {self.asked} clients of round {number} failed alike, so that the state they were sent, or how "
                f"they train, is to blame and no client: {self.dropped[min(self.dropped)]}; lower client.lr or change "
                f"the trainer.* keys in another output_dir, or delete the checkpoint of round {number - 1} and use "
                "resume=auto"
            )
        *before, client = self.dropped
        also = f" (dropped before it: {', '.join(sorted(before))})" if before else ""
        raise ClientError(
            f"client {client!r} failed in round {number}: {self.dropped[client]}; that leaves {left} of {self.asked} "
            f"clients{also}, and federation.min_clients asks for {self.wanted}; fix the client or lower "
            f"federation.min_clients, then resume=auto"
        )

    def late(self) -> bool:
        """Return whether a client was too slow, which says nothing about what it was sent."""
        return any(reason.startswith("late:") for reason in self.dropped.values())

    def kind(self, client: str) -> str:
        """Return why a client was dropped, without its name and without numbers."""
        return re.sub(r"[-+.\d]+", "#", self.dropped[client].replace(client, ""))

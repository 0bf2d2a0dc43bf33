"""Who takes part in a round's result: failing, late and invalid clients are dropped, each with its reason."""

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
        try:
            sent = self.broadcast.addressed_to(answer.client_id)
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

    def drop_long(self, ratio: float) -> None:
        for part in ("", *sorted(self.expected.extras)):
            norms = {client: self.norms[client][part] for client in self.updates}
            for client, reason in too_long(norms, ratio, part).items():
                self.drop(Dropped(client, reason))

    def drop(self, client: Dropped) -> None:
        self.updates.pop(client.client_id, None)
        self.dropped[client.client_id] = client.reason
        self.on_answer(self.broadcast.round, client)
        left = self.asked - len(self.dropped)
        if left >= self.wanted:
            return
        others = sorted(set(self.dropped) - {client.client_id})
        also = f" (dropped before it: {', '.join(others)})" if others else ""
        raise ClientError(
            f"client {client.client_id!r} failed in round {self.broadcast.round}: {client.reason}; that leaves {left} "
            f"of {self.asked} clients{also}, and federation.min_clients asks for {self.wanted}; mend the client or "
            f"lower federation.min_clients, then resume=auto"
        )

"""The one round loop: every federated method runs through it."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedproxy.errors import CheckpointError
from fedproxy.federation.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.engines.base import RunningEngine
from fedproxy.federation.participation import OnAnswer, Participation
from fedproxy.federation.sampling import sample_clients
from fedproxy.plain_json import plain, write_text
from fedproxy.protocol import Broadcast, ClientUpdate
from fedproxy.strategies.aggregators import Aggregation, Aggregator, RoundContext
from fedproxy.strategies.aggregators.product import aggregate_products
from fedproxy.strategies.functional.lowrank import factor_mean_error
from fedproxy.strategies.server_optimizers import ServerOptimizer

Record = dict[str, Any]


@dataclass(frozen=True)
class Federation:
    """The server's side of federated tuning (PAPER Algorithm 1)."""

    clients: Sequence[str]
    clients_per_round: int | str
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    job: Mapping[str, Any]
    """What clients are asked to do (:class:`fedproxy.federation.client.Job`), sent with every broadcast."""
    send_conflict: bool
    """Whether the clients' regularizer needs last round's conflict."""
    lora_scaling: float | None
    """alpha / r of the state's LoRA pairs; None where the state holds none."""
    seed: int
    space: str = "factors"
    """``factors`` merges LoRA's A and B as they are, ``product`` merges s B A and re-factors it."""
    participation: Participation = field(default_factory=Participation)
    """Who may be missing, how long a round may take, and what counts as an update."""
    rows: Mapping[str, int] | None = None
    """Each client's rows where the draw of a round's clients weighs them; None draws all alike."""

    @property
    def clients_in_round(self) -> int:
        """How many clients take part in each round."""
        return len(self.clients) if self.clients_per_round == "all" else int(self.clients_per_round)

    def run(
        self,
        progress: Progress,
        rounds: int,
        engine: RunningEngine,
        *,
        checkpoints: CheckpointFolder,
        journal: Path,
        on_round: Callable[[Record], None] = lambda record: None,
        on_client: OnAnswer = lambda round_, answer: None,
    ) -> Progress:
        """Go on from ``progress`` until ``rounds`` rounds are done, and return the last progress.

        After each round the checkpoint is written whole, then one line is added to ``journal`` (rounds.jsonl).

        Raises:
            ClientError: If too few clients send an update that can be used; earlier rounds stay on disk.
            CheckpointError: If the run folder cannot be written.
        """
        _write_journal(journal, progress.records)
        while progress.round < rounds:
            progress = self._round(progress, engine, on_client)
            checkpoints.save(progress)
            _append(journal, progress.records[-1])
            on_round(progress.records[-1])
        return progress

    def _round(self, before: Progress, engine: RunningEngine, on_client: OnAnswer) -> Progress:
        started = time.perf_counter()
        number = before.round + 1
        chosen = sample_clients(self.clients, self.clients_per_round, seed=self.seed, round=number, rows=self.rows)
        conflict = before.conflict if self.send_conflict and before.conflict else None
        resting = [name for name in before.state if not self.aggregator.trains(name, number)]
        broadcast = Broadcast(number, before.state, conflict, {**self.job, "frozen": resting})
        updates, dropped = self.participation.collect(engine, broadcast, chosen, on_client)
        trained = time.perf_counter()
        context = RoundContext(number, self.seed, before.state, self.lora_scaling or 1.0)
        merged = self._aggregate(updates, before.aggregator_memory, context)
        state, memory = self.server_optimizer.step(before.state, merged.delta, before.server_memory)
        clients = [update.client_id for update in updates]
        examples = [update.num_examples for update in updates]
        record: Record = {
            "round": number,
            "clients": clients,
            **({"dropped": dropped} if dropped else {}),
            "train_loss": _mean([update.train_loss for update in updates], examples),
            "regularizer_loss": _mean([update.regularizer_loss for update in updates], examples),
            **merged.diagnostics,
            "factor_mean_error": self._factor_error(before.state, updates),
            "upload_bytes": sum(update.bytes for update in updates),
            "download_bytes": broadcast.bytes * len(chosen),
            "client_seconds": sum(update.seconds for update in updates),
            "server_seconds": time.perf_counter() - trained,
            "seconds": time.perf_counter() - started,
        }
        return Progress(
            number, state, dict(merged.conflict or {}), memory, dict(merged.memory), [*before.records, record]
        )

    def _aggregate(
        self, updates: Sequence[ClientUpdate], memory: Mapping[str, Tensor], context: RoundContext
    ) -> Aggregation:
        if self.space == "product":
            return aggregate_products(self.aggregator, updates, memory, context)
        return self.aggregator.aggregate(updates, memory, context)

    def _factor_error(self, state: Mapping[str, Tensor], updates: Sequence[ClientUpdate]) -> float | None:
        if self.lora_scaling is None or len(updates) < 2:
            return None
        total = sum(update.num_examples for update in updates)
        weights = [update.num_examples / total for update in updates]
        return factor_mean_error([_Moved(state, update.delta) for update in updates], weights, self.lora_scaling)


class _Moved(Mapping[str, Tensor]):
    """A client's own state, computed tensor by tensor when read."""

    def __init__(self, state: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> None:
        self.state, self.delta = state, delta

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name] + self.delta[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _write_journal(journal: Path, records: Sequence[Record]) -> None:
    """Make the journal hold exactly the finished rounds: a kill between checkpoint and journal may have lost a line."""
    write_text(journal, "".join(_line(record) for record in records))


def _append(journal: Path, record: Record) -> None:
    try:
        with journal.open("a") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{journal} cannot be written: {error}; free disk space, then resume=auto") from error


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"

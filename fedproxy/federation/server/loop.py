"""The one round loop: every federated method runs through it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.federation.server.checkpoint import CheckpointFolder, Counted, Progress
from fedproxy.federation.server.files import ClientState, ServerFiles
from fedproxy.federation.server.participation import OnAnswer, Participation
from fedproxy.federation.server.sampling import sample_clients
from fedproxy.federation.server.secure_rounds import key_shares, left, sum_of, sums_in
from fedproxy.federation.server.state_checks import StateCheck, check_saved
from fedproxy.federation.server.validation import RoundValidation
from fedproxy.files import plain, write_text
from fedproxy.messages import Sites
from fedproxy.privacy.keys import Occasion
from fedproxy.protocol import Broadcast, ClientUpdate, Mapped, nbytes
from fedproxy.seeding import ClientSeeds
from fedproxy.strategies.aggregators import Aggregation, Aggregator, RoundContext
from fedproxy.strategies.aggregators.cohort import Source
from fedproxy.strategies.aggregators.product import aggregate_products
from fedproxy.strategies.functional.lowrank import factor_mean_error
from fedproxy.strategies.round_parts import RoundPart, RoundResult, described
from fedproxy.strategies.round_parts.secure_sum import SecureSum, with_shares
from fedproxy.strategies.server_optimizers import ServerOptimizer

Record = dict[str, Any]


@dataclass(frozen=True)
class Federation:
    """The server's side of federated tuning (FedProxy, arXiv 2604.19015, Algorithm 1)."""

    clients: Sequence[str]
    clients_per_round: int | str
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    job: Mapping[str, Any]
    """What clients are asked to do (:class:`fedproxy.federation.client.training.Job`), sent with every broadcast."""
    parts: Sequence[RoundPart]
    """What rides with the rounds beside the state, in the order of the chain."""
    lora_scaling: float | None
    """Scale of the state's LoRA pairs; None where the state holds none, or other tensors with them."""
    seed: int
    files: ServerFiles
    """What the server keeps beside its checkpoints."""
    space: str = "factors"
    """``factors`` merges LoRA's A and B as they are, ``product`` merges s B A and re-factors it."""
    validation: RoundValidation | None = None
    """Scores the state between rounds."""
    participation: Participation = field(default_factory=Participation)
    """Who may be missing, how long a round may take, and what counts as an update."""
    rows: Mapping[str, int] | None = None
    """Each client's rows where the draw of a round's clients weighs them; None draws all alike."""
    registered: Mapping[str, bytes] = field(default_factory=dict)
    """Clients' registered signing keys, for secure sums; of clients without one their peers alone verify shares."""
    client_processes: int = 1
    """Processes that train a client, each with a seed of its own for dropout."""

    @property
    def clients_in_round(self) -> int:
        """How many clients take part in each round."""
        return len(self.clients) if self.clients_per_round == "all" else int(self.clients_per_round)

    def run(
        self,
        progress: Progress,
        rounds: int,
        engine: Sites,
        *,
        checkpoints: CheckpointFolder,
        journal: Path,
        on_round: Callable[[Record], None] = lambda record: None,
        on_client: OnAnswer = lambda round_, answer: None,
    ) -> Progress:
        """Go on from ``progress`` until ``rounds`` rounds are done, and return the last progress.

        After each round the checkpoint is written whole, then ``journal`` (rounds.jsonl) with one line more.

        Raises:
            ClientError: If too few clients send an update that can be used; earlier rounds stay on disk.
            CheckpointError: If the run folder cannot be written.
        """
        write_journal(journal, progress.records)
        while progress.round < rounds:
            if self._secure is None:
                turn = self._turn(progress) if self.aggregator.aggregates else self._separate_turn(progress)
                updates, gone = self.participation.collect(engine, turn.broadcast, turn.chosen, on_client, turn.take_in)
                progress = turn.finish(updates, gone)
            else:
                progress = self._secure_round(progress, self._secure, engine, on_client)
            check_saved(progress)
            checkpoints.save(progress, pinned=self._validate(progress))
            write_journal(journal, progress.records)
            on_round(progress.records[-1])
        return progress

    @property
    def _secure(self) -> SecureSum | None:
        return next((part for part in self.parts if isinstance(part, SecureSum)), None)

    def _secure_round(self, before: Progress, secure: SecureSum, engine: Sites, on_client: OnAnswer) -> Progress:
        """Run one round of a secure sum, which is repeated without the clients that are missing."""
        number, missing = before.round + 1, dict[str, str]()
        asked, taking = self.chosen(number), replace(self.participation, together=True)
        least, folder = self.participation.min_clients, self.participation.folder
        for attempt in range(len(asked)):
            clients = left(asked, missing, least, number)
            occasion = Occasion(secure.run, number, attempt)
            shares, gone = key_shares(engine, clients, occasion, self.registered, folder)
            if not gone:
                turn = self._turn(before, clients, partial(with_shares, shares=shares, attempt=attempt))
                updates, gone = taking.collect(engine, turn.broadcast, clients, on_client, turn.take_in)
                if not gone:
                    return turn.finish(updates, missing)
            missing |= gone
        raise ClientError(f"round {number} has no client left; fix the clients, then resume=auto")

    def _separate_turn(self, before: Progress) -> "_Turn":
        """Begin a round in which every client goes on from a state of its own and no update meets another's.

        Who is dropped keeps the state it had.
        """
        started, number = time.perf_counter(), before.round + 1
        chosen, states = self.chosen(number), self.files.states.after(before, self.clients)
        common = self._addressed(before, number, chosen, {})
        broadcast = replace(common, each=Mapped(states, lambda _, state: replace(common, state=state)))

        def finish(updates: Sequence[ClientUpdate], dropped: Mapping[str, str]) -> Progress:
            trained = time.perf_counter()
            norms = []
            for update in updates:
                own = states.load(update.client_id)
                context = RoundContext(number, self.seed, own.state, self.lora_scaling or 1.0)
                merged, state, memory = self._step([update], own, context)
                self.files.states.save(update.client_id, number, ClientState(state, memory, merged.memory))
                norms += merged.diagnostics["update_norms"]
            record: Record = {
                **self._taken(number, updates, dropped),
                "update_norms": norms,
                "download_bytes": self._sent_bytes(broadcast, chosen),
                "server_seconds": time.perf_counter() - trained,
                "seconds": time.perf_counter() - started,
            }
            files, kept = self.files.kept(before, number, record["clients"]), _kept(before, number, updates)
            return replace(before, round=number, records=[*before.records, record], files=files, kept=kept)

        return _Turn(broadcast, chosen, lambda update: update, finish)

    def chosen(self, number: int) -> list[str]:
        """Return the clients that are drawn for a round."""
        return sample_clients(self.clients, self.clients_per_round, seed=self.seed, round=number, rows=self.rows)

    def _addressed(
        self, before: Progress, number: int, chosen: Sequence[str], state: Mapping[str, Tensor]
    ) -> Broadcast:
        """Return the broadcast of a state, with what is each client's own: its seeds, and what it goes on from."""
        seeds = {client: ClientSeeds.of(self.seed, number, client, self.client_processes) for client in chosen}
        kept = {client: before.kept_by(client) for client in chosen}
        return Broadcast(number, state, self._job(before.state, number), all_seeds=seeds, all_kept=kept)

    def _job(self, state: Mapping[str, Tensor], number: int) -> dict[str, Any]:
        """Return what clients of a round are asked to do, with the tensors that rest and the parts of the round."""
        resting, parts = self._resting(state, number), [described(part) for part in self.parts]
        return {**self.job, "frozen": resting, "parts": parts}

    def _resting(self, state: Mapping[str, Tensor], number: int) -> list[str]:
        return [name for name in state if not self.aggregator.trains(name, number)]

    def _turn(
        self,
        before: Progress,
        clients: Sequence[str] | None = None,
        added: Callable[[Broadcast], Broadcast] = lambda broadcast: broadcast,
    ) -> "_Turn":
        """Begin a round whose updates are merged.

        Args:
            before: The progress that it goes on from.
            clients: Who takes part; drawn by default.
            added: Adds to the broadcast what all clients of the round need of each other.
        """
        started, chosen = time.perf_counter(), self.chosen(before.round + 1) if clients is None else clients
        broadcast = added(self._broadcast(before, before.round + 1, chosen))
        return _Turn(
            broadcast,
            chosen,
            lambda update: self._taken_in(update, broadcast, before),
            lambda updates, dropped: self._merge(before, started, broadcast, chosen, updates, dropped),
        )

    def _merge(
        self,
        before: Progress,
        started: float,
        broadcast: Broadcast,
        chosen: Sequence[str],
        updates: Sequence[ClientUpdate],
        dropped: Mapping[str, str],
    ) -> Progress:
        """Merge a round's updates, move the state by the result, and let every part keep its memory."""
        number = broadcast.round
        trained = time.perf_counter()
        sent = self._seen(broadcast).state
        start = ClientState(sent, before.remembered("server_optimizer"), before.remembered("aggregator"))
        received, updates = updates, self._gathered(updates)
        context, present = RoundContext(number, self.seed, sent, self.lora_scaling or 1.0), len(received)
        merged, state, remembered = self._step(updates, start, context, present / self.clients_in_round)
        memory = {"aggregator": dict(merged.memory), "server_optimizer": remembered}
        result = RoundResult(number, len(self.clients), broadcast, updates, merged, received=received)
        for part in self.parts:
            memory[part.name] = dict(part.collect(before.remembered(part.name), result))
        record: Record = {
            **self._taken(number, received, dropped),
            **({} if self._secure else merged.diagnostics),  # a sum differs from nobody
            "conflict_by_layer": None if self._secure else merged.conflict_by_layer(),
            "factor_mean_error": self._factor_error(before.state, updates),
            "realignment_loss": None,
            **result.figures,
            "download_bytes": self._sent_bytes(broadcast, chosen),
            "server_seconds": time.perf_counter() - trained + result.figures.get("server_seconds", 0.0),
            "seconds": time.perf_counter() - started,
        }
        if merged.base_change:
            self.files.changes.files.write(number, merged.base_change)
        return Progress(
            number,
            {**before.state, **state},
            memory,
            [*before.records, record],
            self.files.kept(before, number, ()),
            _kept(before, number, received),
        )

    def _gathered(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """Return the updates as they are merged; masked ones as one that the rule weighs as it would have them all."""
        for part in self.parts:
            updates = part.gather(updates)
        if self._secure is None:
            return updates
        return [sum_of(updates, self._secure, self.aggregator, self.seed)]

    def _taken(self, number: int, updates: Sequence[ClientUpdate], dropped: Mapping[str, str]) -> Record:
        """Return what a record says of the updates that were taken; losses are means over examples."""
        examples = [update.num_examples for update in updates]
        return {
            "round": number,
            "clients": [update.client_id for update in updates],
            **{name: figure for part in self.parts if updates for name, figure in part.told(updates).items()},
            **({"dropped": dict(dropped)} if dropped else {}),
            "train_loss": _mean([update.train_loss for update in updates], examples),
            "regularizer_loss": _mean([update.regularizer_loss for update in updates], examples),
            "upload_bytes": sum(update.bytes for update in updates),
            "client_seconds": sum(update.seconds for update in updates),
        }

    def _broadcast(self, before: Progress, number: int, chosen: Sequence[str]) -> Broadcast:
        """Return what is sent: every part adds what it has."""
        broadcast = self._addressed(before, number, chosen, before.state)
        for part in self.parts:
            broadcast = part.send(broadcast, before.remembered(part.name))
        return broadcast

    def _seen(self, broadcast: Broadcast) -> Broadcast:
        for part in reversed(self.parts):
            broadcast = part.seen(broadcast)
        return broadcast

    def _taken_in(self, update: ClientUpdate, broadcast: Broadcast, before: Progress) -> ClientUpdate:
        """Return an update in the form that rules read.

        Raises:
            ClientError: If it does not go with what a part remembers.
        """
        taken = update
        for part in reversed(self.parts):
            part.verify(taken, before.remembered(part.name))
            taken = part.take(taken, broadcast)
        return update if taken is update else replace(taken, wire_bytes=update.bytes)

    def _sent_bytes(self, broadcast: Broadcast, served: Sequence[str]) -> int:
        """Return the bytes that go to the round's clients, and to all others those of parts that reach everybody."""
        each = sum(nbytes(broadcast.extras.get(part.name, {})) for part in self.parts if part.to_all)
        sent = sum(broadcast.addressed_to(client).bytes for client in served)
        return sent + each * (len(self.clients) - len(served))

    def _validate(self, progress: Progress) -> int | None:
        """Add the state's scores to the last record, and return the round whose checkpoint must stay."""
        if self.validation is None:
            return None
        progress.records[-1] |= self.validation.record(progress.round, progress.state)
        return self.validation.pinned(progress.records)

    def _step(
        self, updates: Sequence[ClientUpdate], before: ClientState, context: RoundContext, present: float = 1.0
    ) -> tuple[Aggregation, dict[str, Tensor], dict[str, Tensor]]:
        """Merge updates, of this part of the clients, and move a state by the result; it is checked and may be saved.

        Returns:
            What the rule gave, the new state, and the server optimizer's memory.
        """
        merged = self._aggregate(updates, before.aggregator_memory, context)
        norms = zip(updates, merged.diagnostics.get("update_norms", ()), strict=False)
        check = StateCheck(
            context.round,
            self.aggregator.name,
            self.server_optimizer.name,
            self.participation.max_norm_ratio,
            {update.client_id: norm for update, norm in norms},
        )
        check.merged(merged)
        optimizer, resting = self.server_optimizer.taking(present), self._resting(before.state, context.round)
        state, memory = optimizer.step(before.state, merged.delta, before.server_memory, resting)
        check.moved(before.state, state, memory)
        return merged, state, memory

    def _aggregate(
        self, updates: Sequence[ClientUpdate], memory: Mapping[str, Tensor], context: RoundContext
    ) -> Aggregation:
        if self._secure is not None and self.aggregator.sum_part:
            return self.aggregator.merge_sums(sums_in(updates[0], self.parts))
        if self.space == "product":
            return aggregate_products(self.aggregator, updates, memory, context)
        return self.aggregator.aggregate(updates, memory, context)

    def _factor_error(self, state: Mapping[str, Tensor], updates: Sequence[ClientUpdate]) -> float | None:
        if self.lora_scaling is None or len(updates) < 2:
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if any({name: Source.of(update.delta, name).shape for name in update.delta} != shapes for update in updates):
            return None  # personal tensors, or factors of other ranks
        total = sum(update.num_examples for update in updates)
        weights = [update.num_examples / total for update in updates]
        return factor_mean_error([_Moved(state, update.delta) for update in updates], weights, self.lora_scaling)


@dataclass(frozen=True)
class _Turn:
    """A round that has begun: what is sent to whom, how an update is taken in, and what becomes of all of them."""

    broadcast: Broadcast
    chosen: Sequence[str]
    take_in: Callable[[ClientUpdate], ClientUpdate]
    finish: Callable[[Sequence[ClientUpdate], Mapping[str, str]], Progress]


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


def _kept(before: Progress, number: int, updates: Sequence[ClientUpdate]) -> dict[str, Counted]:
    """Return what clients go on from after a round: where an update did not count, what it was before."""
    now: dict[str, Counted] = {
        update.client_id: {
            "round": number,
            "seal": update.seal,
            "examples": update.num_examples,
            "tokens": update.num_tokens,
        }
        for update in updates
        if update.seal
    }
    return {**before.kept, **now}


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def write_journal(journal: Path, records: Sequence[Record]) -> None:
    """Make the journal hold exactly the finished rounds, as a new file: runs that share rounds share the old one."""
    write_text(journal, "".join(_line(record) for record in records))


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"

"""Differential privacy of what a client sends: an update clipped and noised, or tuned by DP-SGD, and its ledger."""

import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.privacy.accounting import Release
from fedproxy.privacy.ledger import Charge, Ledger, Terms
from fedproxy.privacy.noise import SecretStream, noised
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart, RoundResult
from fedproxy.strategies.round_parts.clip_noise import clip
from fedproxy.strategies.trainable.base import TrainableModel

_FIGURES = ("noise_multiplier", "rate", "steps", "epsilon")
"""What a client says of its release; an epsilon without bound is -1."""


@dataclass(frozen=True)
class Privacy(RoundPart, name="privacy"):
    """Bounds what a row or a client adds to a round, hides it under noise, and keeps account of it.

    The client's side charges its ledger before it trains, and works alone: what it does, and which budget it keeps,
    depends on no promise of the server. It comes first in the chain, so that what other parts compute from the update
    is made of what was released already. Losses, row and token counts are withheld.
    """

    order: ClassVar[int] = 8

    unit: str = "client"
    """What is protected: ``example`` or ``client``."""
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    """In units of ``clip``; None is the least that keeps the budget over ``rounds``."""
    clip: float = 1.0
    accountant: str = "pld"
    sampling: str = "none"
    """Draw that is accounted for: poisson, none or without_replacement."""
    noise_at: str = "client"
    drawn: int = 0
    """Clients of a round."""
    among: int = 0
    """All clients."""
    rounds: int = 1
    """Rounds in which a client takes part at most."""
    run: str = ""
    """Tells this run's rounds from another's."""
    physical_batch: int | None = None
    test_seed: int | None = None
    least: int = field(default=1, metadata={"server": True})
    """Fewest updates that a round may have: noise at the server is shared out for so many."""

    def receive(self, task: ClientRound) -> None:
        """Charge the ledger, and say how to train where rows are protected.

        Raises:
            ClientError: If the budget does not allow this round.
        """
        if not task.writes:
            return  # another process of this client sends
        batch = int(task.broadcast.job["batch_size"]) * int(task.broadcast.job["accumulate"])
        release = self._release(len(task.examples), batch, task.broadcast.job)
        charge, key = self._charge(task, release), _digest(task)
        task.kept[self.name] = {"releases": torch.tensor(charge.releases)}
        secret = charge.secret if self.test_seed is None else _test_secret(self.test_seed, task.client_id)
        task.privacy = charge, SecretStream(secret, key)
        if self.unit == "example":
            task.training = self._training(task, charge.release, batch, SecretStream(secret, key))

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Clip and noise the update where clients are protected, and withhold what is not accounted for."""
        if task.privacy is None:
            return update
        charge, stream = task.privacy
        delta: Tensors = update.delta
        if self.unit == "client":
            delta = clip(delta, self.clip)
            if self.noise_at == "client" and charge.release.noise_multiplier:
                delta = noised(delta, charge.release.noise_multiplier * self.clip, stream)
        extras = {**update.extras, self.name: {"release": _figures(charge)}}
        return replace(
            update, delta=delta, extras=extras, num_examples=1, num_tokens=0, train_loss=None, regularizer_loss=None
        )

    def take(self, update: ClientUpdate, broadcast: Broadcast) -> ClientUpdate:
        """Add the server's share of the noise, of which ``least`` make up the whole.

        The equal mean of n updates then has noise of at least noise_multiplier * clip / n, whoever is dropped later.
        """
        if self.noise_at == "client" or not self.noise_multiplier:
            return update
        test = None if self.test_seed is None else _test_secret(self.test_seed, update.client_id)
        stream = SecretStream(test or secrets.token_bytes(32), str(update.round))
        share = self.noise_multiplier * self.clip / math.sqrt(self.least)
        return replace(update, delta=noised(update.delta, share, stream))

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Keep what every client has released, one row (noise multiplier, rate, steps, epsilon) for each round.

        Raises:
            ClientError: If a client's release has less noise than its earlier ones.
        """
        kept = {name: memory[name] for name in memory}
        for update in result.received or result.updates:
            row = update.extras[self.name]["release"][None]
            before = kept.get(update.client_id)
            if before is not None and float(row[0, 0]) < float(before[:, 0].max()) * (1 - 1e-9):
                raise ClientError(
                    f"client {update.client_id!r} added noise {float(row[0, 0]):.4g} in round {result.round}, and "
                    f"{float(before[:, 0].max()):.4g} before; a run that goes on may not lower privacy.noise_multiplier"
                )
            kept[update.client_id] = row.clone() if before is None else torch.cat([before, row])
        return kept

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Add the figures of the release."""
        form = torch.empty(len(_FIGURES), dtype=torch.float64, device="meta")
        return {**up, self.name: Group({"release": form})}

    def _release(self, rows: int, batch: int, job: Mapping[str, Any]) -> Release:
        noise = self.noise_multiplier or 0.0
        if self.unit == "example":
            from fedproxy.privacy.dp_sgd import sampling_of, steps_of

            rate, steps = sampling_of(rows, batch)
            return Release(noise, "poisson", rate, steps=steps_of(steps, int(job["epochs"]), job.get("max_steps")))
        if self.sampling == "without_replacement":
            return Release(noise, self.sampling, self.drawn / self.among, drawn=self.drawn, of=self.among)
        return Release(noise)

    def _charge(self, task: ClientRound, release: Release) -> Charge:
        if task.ledger is None:
            raise ClientError("this client has no place for a privacy ledger; set privacy.ledger")
        terms = Terms(self.run, self.unit, self.epsilon, self.delta, self.accountant, release, self.rounds)
        known = int(task.memory.get(self.name, {}).get("releases", torch.tensor(0)))
        return Ledger(task.ledger, task.client_id).charge(terms, task.broadcast.round, _digest(task), known=known)

    def _training(self, task: ClientRound, release: Release, batch: int, stream: SecretStream) -> Any:
        from fedproxy.privacy.dp_sgd import PrivateTraining, sampling_of

        return PrivateTraining(
            clip=self.clip,
            noise_multiplier=release.noise_multiplier,
            rate=release.rate,
            steps=sampling_of(len(task.examples), batch)[1],
            charged=release.steps,
            physical_batch=self.physical_batch or int(task.broadcast.job["batch_size"]),
            stream=stream,
        )


def figures(updates: Sequence[ClientUpdate]) -> dict[str, float | None]:
    """Return a round's figures for its record: the most epsilon that a client has spent, and the least noise."""
    rows = torch.stack([update.extras["privacy"]["release"] for update in updates])
    epsilon = float(rows[:, 3].max())
    unbounded = bool((rows[:, 3] < 0).any())
    return {"epsilon": None if unbounded else epsilon, "noise_multiplier": float(rows[:, 0].min())}


def _figures(charge: Charge) -> Tensor:
    release, epsilon = charge.release, charge.epsilon
    values = [release.noise_multiplier, release.rate, release.steps, epsilon if math.isfinite(epsilon) else -1.0]
    return torch.tensor(values, dtype=torch.float64)


def _test_secret(seed: int, client_id: str) -> bytes:
    return hashlib.sha256(json.dumps([seed, client_id]).encode()).digest()


def _digest(task: ClientRound) -> str:
    """Return a hash of all that a client's release depends on: what it was sent and its rows."""
    sent = task.broadcast
    seeds = None if sent.seeds is None else asdict(sent.seeds)
    found = hashlib.sha256(json.dumps([sent.round, dict(sent.job), seeds], sort_keys=True, default=str).encode())
    for group, tensors in [("state", task.state), *sorted(sent.extras.items())]:
        for name, part in _bytes(tensors):
            found.update(f"{group}/{name}".encode())
            found.update(part)
    for example in task.examples:
        found.update(json.dumps(asdict(example), sort_keys=True).encode())
    return found.hexdigest()


def _bytes(tensors: Tensors) -> Iterator[tuple[str, memoryview]]:
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield f"{name} {tensor.dtype}", memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]

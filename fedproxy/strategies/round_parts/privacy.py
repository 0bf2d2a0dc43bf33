"""Differential privacy of what a client sends: an update clipped and noised, or tuned by DP-SGD, and its ledger."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedproxy.errors import CheckpointError, ClientError, one_line
from fedproxy.privacy.accounting import Release
from fedproxy.privacy.ledger import Charge, Ledger, Terms
from fedproxy.privacy.noise import SecretStream, noised
from fedproxy.privacy.releases import Releases
from fedproxy.privacy.server_noise import ServerNoise
from fedproxy.protocol import ClientUpdate, Tensors
from fedproxy.sealed_tensors import tensors_sha256
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart, RoundResult
from fedproxy.strategies.round_parts.clip_noise import clip
from fedproxy.strategies.round_parts.secure_sum import SecureSum
from fedproxy.strategies.trainable.base import TrainableModel

_LONGEST_RUN = 128
_log = logging.getLogger(__name__)
_FIGURES = ("noise_multiplier", "rate", "steps", "epsilon")
"""What a client says of its release; an epsilon without bound is -1."""


@dataclass(frozen=True)
class Privacy(RoundPart, name="privacy"):
    """Bounds what a row or a client adds to a round, hides it under noise, and keeps account of it.

    The client's side charges its ledger before it trains. The budget, and what it counts as a release, come with the
    round: a site that does not take the server's word for them sets bounds in its policy. It comes first in the chain,
    so that what other parts compute from the update is made of what was released already. Losses, row and token counts
    are withheld.

    A release leaves the client once it is on the disk and its ledger says so; asked for the same again the client sends
    that one, and does not train (:mod:`fedproxy.privacy.ledger`).
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
    noise: ServerNoise | None = field(default=None, metadata={"server": True})
    """Where noise at the server comes from."""

    def __post_init__(self) -> None:
        """Check the options, which come with a round from the server: what is written into a ledger stays there."""
        self.require("unit", self.unit in ("example", "client"), "example or client")
        self.require("accountant", self.accountant in ("pld", "rdp"), "pld or rdp")
        self.require("noise_at", self.noise_at in ("client", "server"), "client or server")
        self.require("run", isinstance(self.run, str) and len(self.run) <= _LONGEST_RUN, "a short text")
        self.require("rounds", type(self.rounds) is int and self.rounds >= 1, "a whole number from 1")
        for key in ("epsilon", "delta", "noise_multiplier"):
            value = getattr(self, key)
            self.require(key, value is None or (_is_number(value) and value >= 0), "a finite number from 0, or null")
        self.require("clip", _is_number(self.clip) and self.clip > 0, "positive and finite")
        secret = self.sampling == "without_replacement"
        self.require("sampling", secret or self.sampling in ("none", "poisson"), "one that is accounted for")
        self.require("sampling", not secret or self.noise_at == "server", "none where clients add the noise")
        self.require("drawn", not secret or 0 < self.drawn <= self.among, "at most the clients there are")

    def receive(self, task: ClientRound) -> None:
        """Charge the ledger, and say how to train where rows are protected.

        Raises:
            ClientError: If the budget does not allow this round.
        """
        if not task.writes:
            return  # another process of this client sends
        batch = int(task.broadcast.job["batch_size"]) * int(task.broadcast.job["accumulate"])
        charge = self._charged(task, self._release(len(task.examples), batch, task.broadcast.job))
        task.kept[self.name] = {"releases": torch.tensor(charge.releases)}
        task.privacy = charge
        if self.unit == "example" and task.released is None:
            task.training = self._training(task, charge, batch)

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Clip and noise the update where clients are protected, and withhold what is not accounted for.

        Raises:
            ClientError: If another process of this client was faster with the same release.
            CheckpointError: If the release cannot be kept; then it does not leave either.
        """
        if task.privacy is None:
            return update
        charge: Charge = task.privacy
        if task.released is None:
            delta = self._hidden(update.delta, charge)
            self._keep(task, charge, task.model.state() if self.unit == "example" else delta)
        else:
            delta = self._made_before(task, *task.released)
        extras = {**update.extras, self.name: {"release": _figures(charge)}}
        return replace(
            update, delta=delta, extras=extras, num_examples=1, num_tokens=0, train_loss=None, regularizer_loss=None
        )

    def verify(self, update: ClientUpdate, memory: Tensors) -> None:
        """Compare the noise of a release with that of the client's earlier ones.

        Raises:
            ClientError: If it is less.
        """
        before, now = memory.get(update.client_id), float(update.extras[self.name]["release"][0])
        if before is not None and now < (most := float(before[:, 0].max())) * (1 - 1e-9):
            raise ClientError(
                f"it added noise {now:.4g}, and {most:.4g} before; a run that goes on may not lower "
                "privacy.noise_multiplier"
            )

    def gather(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """Add the server's shares of the noise, of which ``least`` make up the whole.

        The equal mean of n updates then has noise of at least noise_multiplier * clip / n. The shares depend on all of
        them together: a round that is repeated with the same updates gives the same bits.

        Raises:
            CheckpointError: If the round was merged before, from other updates.
        """
        if self.noise_at == "client" or not self.noise_multiplier or not updates:
            return updates
        number, sums = updates[0].round or 0, {update.client_id: tensors_sha256(update.delta) for update in updates}
        if self.test_seed is None:
            assert self.noise is not None, "the server binds it"
            key = self.noise.key(number, sums)
        else:
            key = _test_key(self.test_seed, number, sums)
        share = self.noise_multiplier * self.clip / math.sqrt(self.least)
        return [
            replace(
                update,
                delta=noised(update.delta, share, SecretStream(key, update.client_id)),
                wire_bytes=update.bytes,
            )
            for update in updates
        ]

    def told(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        """Return a round's figures: the most epsilon that a client has spent, and the least noise."""
        rows = torch.stack([update.extras[self.name]["release"] for update in updates])
        unbounded = bool((rows[:, 3] < 0).any())
        epsilon = None if unbounded else float(rows[:, 3].max())
        return {self.name: {"epsilon": epsilon, "noise_multiplier": float(rows[:, 0].min())}}

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Keep what every client has released, one row (noise multiplier, rate, steps, epsilon) for each round."""
        kept = {name: memory[name] for name in memory}
        for update in result.received:
            row = update.extras[self.name]["release"][None]
            before = kept.get(update.client_id)
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

    def _charged(self, task: ClientRound, release: Release) -> Charge:
        """Charge the ledger, or find in ``task.released`` what the same request released before."""
        if task.ledger is None:
            raise ClientError("this client has no place for a privacy ledger; set privacy.ledger")
        terms = Terms(self.run, self.unit, self.epsilon, self.delta, self.accountant, release, self.rounds)
        ledger, releases = Ledger(task.ledger, task.client_id), Releases(task.ledger, task.client_id)
        number, request = task.broadcast.round, _request(task)
        options: dict[str, Any] = {
            "known": int(task.memory.get(self.name, {}).get("releases", torch.tensor(0))),
            "key": b"" if self.test_seed is None else _test_key(self.test_seed, task.client_id, request),
        }
        charge = ledger.charge(terms, number, request, **options)
        if charge.made:
            try:
                task.released = releases.read(charge.number, charge.made)
            except CheckpointError as error:
                _log.warning("round %d is charged again: %s", number, one_line(error))
                charge = ledger.charge(terms, number, request, **options, anew=True)
        releases.keep(ledger.needed(self.run, number))
        return charge

    def _hidden(self, delta: Tensors, charge: Charge) -> Tensors:
        """Return an update clipped and noised, where a client is protected; DP-SGD has done its own."""
        if self.unit == "example":
            return delta
        clipped = clip(delta, self.clip)
        if self.noise_at == "server" or not charge.release.noise_multiplier:
            return clipped
        return noised(clipped, charge.release.noise_multiplier * self.clip, SecretStream(charge.key))

    def _made_before(self, task: ClientRound, kept: Tensors, figures: Tensors) -> Tensors:
        """Return an earlier release, and leave model and task as they were after it."""
        task.steps, task.lr = int(figures["steps"]), float(figures["lr"])
        if self.unit == "client":
            return kept
        task.model.load_state(kept)  # what was tuned by DP-SGD may be used as it is, as by personal tensors
        return {name: tuned.sub_(task.state[name]) for name, tuned in task.model.state().items()}

    def _keep(self, task: ClientRound, charge: Charge, released: Tensors) -> None:
        assert task.ledger is not None, "it was charged"
        figures = {"steps": torch.tensor(task.steps), "lr": torch.tensor(task.lr, dtype=torch.float64)}
        seal = Releases(task.ledger, task.client_id).write(charge.number, released, figures)
        if Ledger(task.ledger, task.client_id).made(charge.number, seal) != seal:
            raise ClientError("another process trained this client for the same round; ask again")

    def _training(self, task: ClientRound, charge: Charge, batch: int) -> Any:
        from fedproxy.privacy.dp_sgd import PrivateTraining, sampling_of

        release = charge.release
        return PrivateTraining(
            clip=self.clip,
            noise_multiplier=release.noise_multiplier,
            rate=release.rate,
            steps=sampling_of(len(task.examples), batch)[1],
            charged=release.steps,
            physical_batch=self.physical_batch or int(task.broadcast.job["batch_size"]),
            stream=SecretStream(charge.key),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figures(charge: Charge) -> Tensor:
    release, epsilon = charge.release, charge.epsilon
    values = [release.noise_multiplier, release.rate, release.steps, epsilon if math.isfinite(epsilon) else -1.0]
    return torch.tensor(values, dtype=torch.float64)


def _test_key(seed: int, *words: Any) -> bytes:
    return hashlib.sha256(json.dumps([seed, *words]).encode()).digest()


def _request(task: ClientRound) -> str:
    """Return a hash of what a client is asked: what it was sent, and its rows.

    It decides what an earlier release answers, and no noise depends on it. Left out is what the round and the run's
    name decide (seeds), and what is new each time that a round is repeated and nothing was made of before the update
    was masked: key shares of a secure sum.
    """
    sent = task.broadcast
    words = [sent.round, dict(sent.job), asdict(sent.kept)]
    found = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode())
    for group, tensors in [("state", task.state), *sorted(sent.extras.items())]:
        if group == SecureSum.name:
            continue
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

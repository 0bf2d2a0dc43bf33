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
from fedproxy.privacy.accounting import MOST_EPSILON, MOST_NOISE, Release
from fedproxy.privacy.adaptive_clip import next_clip, split_noise
from fedproxy.privacy.ledger import Charge, Ledger, Terms
from fedproxy.privacy.noise import SecretStream, noised
from fedproxy.privacy.releases import Releases
from fedproxy.privacy.server_noise import ServerNoise
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.sealed_tensors import tensors_sha256
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart, RoundResult
from fedproxy.strategies.round_parts.clip_noise import clip, norm
from fedproxy.strategies.round_parts.secure_sum import SecureSum
from fedproxy.strategies.trainable.base import TrainableModel

_LONGEST_RUN = 128
_log = logging.getLogger(__name__)
_FIGURES = ("noise_multiplier", "rate", "steps", "epsilon")
"""What a client says of its release; an epsilon without bound is -1."""
_CLIP, _CLIENT = "clip", "client/"
"""Where the server keeps the next round's clip, and what each client released: a name alone may be any text, and that
of a tensor may not."""


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
    """Of this round, as clients read it; of the first one, as the server's own part has it."""
    quantile: float | None = None
    """Share of updates that the clip should leave whole, which it then follows; None keeps it."""
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
        for key, most in (("epsilon", MOST_EPSILON), ("delta", 1), ("noise_multiplier", MOST_NOISE)):
            value = getattr(self, key)
            ok = value is None or (_is_number(value) and 0 <= value <= most)
            self.require(key, ok, f"a number from 0 to {most:g}, or null")
        self.require("clip", _is_number(self.clip) and self.clip > 0, "positive and finite")
        share = self.quantile
        self.require("quantile", share is None or (_is_number(share) and 0 < share < 1), "in (0, 1), or null")
        self.require("quantile", share is None or self.unit == "client", "null where rows are protected")
        secret = self.sampling == "without_replacement"
        self.require("sampling", secret or self.sampling in ("none", "poisson"), "one that is accounted for")
        self.require("sampling", not secret or self.noise_at == "server", "none where clients add the noise")
        self.require("drawn", not secret or 0 < self.drawn <= self.among, "at most the clients there are")

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Say the round's clip, where it follows the clients."""
        if _CLIP not in memory:
            return broadcast
        here = {"clip": float(memory[_CLIP])}
        parts = [{**node, **here} if node["name"] == self.name else node for node in broadcast.job["parts"]]
        return replace(broadcast, job={**broadcast.job, "parts": parts})

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
        told = {"release": _figures(charge)}
        if task.released is None:
            delta, within = self._hidden(update.delta, charge)
            self._keep(task, charge, task.model.state() if self.unit == "example" else delta, within)
        else:
            delta, within = self._made_before(task, *task.released), task.released[1]
        if self.quantile is not None:
            told["within"] = within["within"]
        extras = {**update.extras, self.name: told}
        return replace(
            update, delta=delta, extras=extras, num_examples=1, num_tokens=0, train_loss=None, regularizer_loss=None
        )

    def verify(self, update: ClientUpdate, memory: Tensors) -> None:
        """Compare the noise of a release with that of the client's earlier ones.

        Raises:
            ClientError: If it is less.
        """
        before, now = memory.get(_CLIENT + update.client_id), float(update.extras[self.name]["release"][0])
        if before is not None and now < (most := float(before[:, 0].max())) * (1 - 1e-9):
            raise ClientError(
                f"it added noise {now:.4g}, and {most:.4g} before; a run that goes on may not lower "
                "privacy.noise_multiplier"
            )

    def take(self, update: ClientUpdate, broadcast: Broadcast) -> ClientUpdate:
        """Note beside an update which clip it was made under, where that changes."""
        if self.quantile is None:
            return update
        clip = next(node["clip"] for node in broadcast.job["parts"] if node["name"] == self.name)
        told = {**update.extras[self.name], "clip": torch.tensor(clip, dtype=torch.float64)}
        return replace(update, extras={**update.extras, self.name: told})

    def gather(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """Add the server's shares of the noise, of which ``least`` make up the whole.

        The equal mean of n updates then has noise of at least noise_multiplier * clip / n. The shares depend on all of
        them together: a round that is repeated with the same updates gives the same bits.

        Raises:
            CheckpointError: If the round was merged before, from other updates.
        """
        if self.noise_at == "client" or not self.noise_multiplier or not updates:
            return updates
        number, sums = updates[0].round or 0, {update.client_id: _sum(update, self.name) for update in updates}
        if self.test_seed is None:
            assert self.noise is not None, "the server binds it"
            key = self.noise.key(number, sums)
        else:
            key = _test_key(self.test_seed, number, sums)
        return [self._with_share(update, SecretStream(key, update.client_id)) for update in updates]

    def told(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        """Return a round's figures: the most epsilon that a client has spent, and the least noise."""
        rows = torch.stack([update.extras[self.name]["release"] for update in updates])
        unbounded = bool((rows[:, 3] < 0).any())
        epsilon = None if unbounded else float(rows[:, 3].max())
        clip = {} if self.quantile is None else {"clip": float(updates[0].extras[self.name]["clip"])}
        return {self.name: {"epsilon": epsilon, "noise_multiplier": float(rows[:, 0].min()), **clip}}

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Keep what every client has released, one row (noise multiplier, rate, steps, epsilon) for each round.

        Where the clip follows the clients, the next round's is beside it.
        """
        kept = {name: memory[name] for name in memory}
        for update in result.received:
            row = update.extras[self.name]["release"][None]
            name = _CLIENT + update.client_id
            before = kept.get(name)
            kept[name] = row.clone() if before is None else torch.cat([before, row])
        if self.quantile is not None:
            told = [update.extras[self.name] for update in result.updates]
            within = 0.5 + float(torch.stack([one["within"] for one in told]).mean())
            clip = next_clip(float(told[0]["clip"]), within, self.quantile)
            kept[_CLIP] = torch.tensor(clip, dtype=torch.float64)
        return kept

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Add the figures of the release."""
        sizes: dict[str, tuple[int, ...]] = {"release": (len(_FIGURES),)}
        if self.quantile is not None:
            sizes["within"] = ()
        forms = {name: torch.empty(size, dtype=torch.float64, device="meta") for name, size in sizes.items()}
        return {**up, self.name: Group(forms, figures=True)}

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

    def _hidden(self, delta: Tensors, charge: Charge) -> tuple[Tensors, Tensors]:
        """Return an update clipped and noised, where a client is protected, and what else it tells.

        DP-SGD has done its own.
        """
        if self.unit == "example":
            return delta, {}
        if not math.isfinite(length := norm(delta)):  # no clip bounds it
            _log.warning("the update is not finite and counts as zero; lower client.lr")
            delta = {name: torch.zeros_like(delta[name]) for name in delta}
        clipped, stream = clip(delta, self.clip), SecretStream(charge.key)
        noise = 0.0 if self.noise_at == "server" else charge.release.noise_multiplier
        if self.quantile is None:
            return noised(clipped, noise * self.clip, stream), {}
        noise, of_count = split_noise(noise)
        within = torch.tensor(0.5 if length <= self.clip else -0.5, dtype=torch.float64)
        return noised(clipped, noise * self.clip, stream), noised({"within": within}, of_count, stream)

    def _with_share(self, update: ClientUpdate, stream: SecretStream) -> ClientUpdate:
        """Return an update with its share of the noise that the server adds, one of ``least`` that make it up.

        It is cut once more: what ``parts.precision`` rounds may be a little longer than what the client cut.
        """
        share = (self.noise_multiplier or 0.0) / math.sqrt(self.least)
        if self.quantile is None:
            delta = noised(clip(update.delta, self.clip), share * self.clip, stream)
            return replace(update, delta=delta, wire_bytes=update.bytes)
        told, bound = update.extras[self.name], float(update.extras[self.name]["clip"])
        share, of_count = split_noise(share)
        delta = noised(clip(update.delta, bound), share * bound, stream)
        within = noised({"within": told["within"]}, of_count, stream)
        extras = {**update.extras, self.name: {**told, **within}}
        return replace(update, delta=delta, extras=extras, wire_bytes=update.bytes)

    def _made_before(self, task: ClientRound, kept: Tensors, figures: Tensors) -> Tensors:
        """Return an earlier release, and leave model and task as they were after it."""
        task.steps, task.lr = int(figures["steps"]), float(figures["lr"])
        if self.unit == "client":
            return kept
        task.model.load_state(kept)  # what was tuned by DP-SGD may be used as it is, as by personal tensors
        return {name: tuned.sub_(task.state[name]) for name, tuned in task.model.state().items()}

    def _keep(self, task: ClientRound, charge: Charge, released: Tensors, beside: Tensors) -> None:
        assert task.ledger is not None, "it was charged"
        figures = {"steps": torch.tensor(task.steps), "lr": torch.tensor(task.lr, dtype=torch.float64), **beside}
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


def _sum(update: ClientUpdate, name: str) -> str:
    """Return a hash of all that the server's noise hides of an update."""
    within = {f"{name}/within": update.extras[name]["within"]} if "within" in update.extras[name] else {}
    return tensors_sha256({**{part: update.delta[part] for part in update.delta}, **within})


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

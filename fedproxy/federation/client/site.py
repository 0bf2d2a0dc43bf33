"""A site: it holds clients' rows, what they remember and the one resident model, and serves what the server asks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.federation.client.scoring import answer_sums
from fedproxy.federation.client.training import Job, client_seeds, tune
from fedproxy.messages import Collect, Done, Evaluate, Facts, Hello, Keys, Message, Rewind, Sums
from fedproxy.names import file_stem
from fedproxy.privacy.keys import Occasion
from fedproxy.privacy.one_time import OneTime
from fedproxy.processes import rank_and_size
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.sealed import content_sha256, tree_sha256
from fedproxy.strategies.round_parts import ClientRound, chain, made
from fedproxy.strategies.round_parts.secure_sum import share_tensor
from fedproxy.strategies.trainable.base import TrainableModel

_PACKAGES = ("fedproxy", "torch", "transformers", "lightning", "peft")
"""Whose versions results depend on."""


class Site:
    """Serves any of its clients on one resident proxy, whose adapter is swapped in place.

    Args:
        model: The proxy with what is trained attached.
        examples: Each client's tokenised rows.
        pad_id: Token that fills up short examples.
        trainer: Options of lightning.Trainer.
        memory: What clients keep between rounds; only rules that need it use it.
        logs: Folder of what Lightning's loggers and profilers write, below it one per client and round.
        held_out: Each client's tokenised rows that it holds back from training.
        proxy: Folder that the model was loaded from, which the server may compare with its own.
        ledger: Folder of the clients' privacy ledgers, beside their data.
        signing: Folder of the clients' signing secrets and of the keys that they have pinned.
    """

    def __init__(
        self,
        model: TrainableModel,
        examples: Mapping[str, Sequence[Example]],
        *,
        pad_id: int,
        trainer: Mapping[str, Any],
        memory: ClientMemory,
        logs: Path | None = None,
        held_out: Mapping[str, Sequence[Example]] | None = None,
        proxy: Path | None = None,
        ledger: Path | None = None,
        signing: Path | None = None,
    ) -> None:
        self.model, self.examples, self.pad_id, self.trainer = model, examples, pad_id, trainer
        self.memory, self.logs, self.held_out, self.proxy = memory, logs, {} if held_out is None else held_out, proxy
        self.ledger, self.signing, self.initial, self._proxy_sha256 = ledger, signing, model.state(), ""

    def train(self, broadcast: Broadcast, client_id: str, *, deadline: float | None = None) -> ClientUpdate:
        """Tune on one client's rows from the broadcast state (Eq 8); the optimiser starts fresh.

        Raises:
            ClientError: If the client has no rows, the broadcast does not fit what it trains or lacks this client's
                seeds, or ``deadline`` (``time.monotonic()``) passes, which is looked at after each batch.
            CheckpointError: If what the client kept cannot be used, or is not what the server knows of.
        """
        started = time.perf_counter()
        job, seeds = Job(**broadcast.job), client_seeds(broadcast)
        parts = chain([made(part) for part in job.parts])  # in whatever order the server names them
        task = self._task(broadcast, client_id, job, seeds.parts)
        for part in reversed(parts):
            part.receive(task)
        if task.released is None or rank_and_size()[1] > 1:  # of several processes, the others do not know
            logs = self.logs and self.logs / file_stem(client_id) / f"round_{broadcast.round:04d}"
            update = tune(task, job, seeds, self.trainer, deadline=deadline, logs=logs)
        else:
            update = ClientUpdate(client_id, {}, round=broadcast.round)
        for part in parts:
            update = part.reply(task, update)
        if task.kept and task.writes:
            update = replace(update, seal=self.memory.save(client_id, broadcast.round, task.kept))
        return replace(update, seconds=time.perf_counter() - started)

    def answer(self, message: Message, client_id: str) -> ClientUpdate | Facts | Sums | Done:
        """Do what a message asks of one client.

        Raises:
            ClientError: If the client cannot.
            CheckpointError: If what the client kept cannot be used, or is not what the server knows of.
        """
        match message:
            case Hello():
                return self.facts(client_id)
            case Rewind():
                if rank_and_size()[0] == 0:
                    self.memory.rewind(client_id, message)
                return Done(client_id)
            case Keys(run, number, attempt):
                if self.signing is None:
                    raise ClientError(f"client {client_id!r} has no signing key; register it")
                if rank_and_size()[0] != 0:  # the first process sends
                    return Done(client_id)
                share = OneTime(self.signing, client_id).share(Occasion(run, number, attempt))
                return ClientUpdate(client_id, {"share": share_tensor(share)}, round=number)
            case Collect(kept):
                own = self.memory.load(client_id, kept).get("personal", {})
                return ClientUpdate(client_id, {name: own[name] for name in own}, round=kept.round)
            case Evaluate(kept, states):
                return self.evaluate(client_id, states, self.memory.load(client_id, kept).get("personal", {}))
        raise ClientError(f"a client does not answer {message.kind!r}; use the server's version of FedProxy")

    def facts(self, client_id: str) -> Facts:
        """Return what one client says of itself: numbers, hashes and versions, and nothing of a row."""
        rows = self.examples[client_id]
        if self.proxy is not None and not self._proxy_sha256:
            self._proxy_sha256 = content_sha256(tree_sha256(self.proxy, "."))
        return Facts(
            client_id,
            rows=len(rows),
            target_tokens=max(example.target_length for example in rows),
            held_out=len(self.held_out.get(client_id, ())),
            proxy=self._proxy_sha256,
            versions={name: version(name) for name in _PACKAGES},
        )

    def evaluate(self, client_id: str, states: Mapping[str, Tensors], own: Tensors) -> Sums:
        """Score states on the rows that one client holds back.

        Args:
            client_id: The client.
            states: Trainable states by name; what they leave out is personal.
            own: The client's personal tensors; those that it has not trained yet are as it was made.

        Raises:
            ClientError: If it holds no rows back, or a state does not fit.
        """
        rows = self.held_out.get(client_id)
        if not rows:
            raise ClientError("the client holds no rows back to be evaluated on; set data.holdout")
        found = {}
        for name, state in states.items():
            self.model.load_state({**self.initial, **own, **state})
            found[name] = answer_sums(self.model.model, rows, self.pad_id, self.trainer)
        return Sums(client_id, found)

    def _task(self, broadcast: Broadcast, client_id: str, job: Job, seed: int) -> ClientRound:
        writes = rank_and_size()[0] == 0
        if writes:
            self.memory.forget_after(client_id, broadcast.kept.round)
        return ClientRound(
            client_id,
            broadcast,
            self.model,
            self.initial,
            state=dict(broadcast.state),
            memory=self.memory.load(client_id, broadcast.kept),
            examples=self.examples[client_id],
            pad_id=self.pad_id,
            base=self.memory.changes,
            device=torch.device("cpu"),
            lr=job.lr,
            seed=seed,
            ledger=self.ledger,
            signing=self.signing,
            writes=writes,
        )

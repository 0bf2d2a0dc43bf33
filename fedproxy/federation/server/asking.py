"""What the server asks clients beside rounds: who they are, to go back, to score states, their personal tensors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.server.admission import Form, Vault, admit
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.expected import Expected
from fedproxy.federation.server.files import ServerFiles
from fedproxy.federation.server.state_checks import LARGEST_WEIGHT, largest
from fedproxy.messages import (
    Answer,
    Answers,
    Collect,
    Done,
    Dropped,
    Evaluate,
    Facts,
    Hello,
    Message,
    Rewind,
    Sites,
    Sums,
    UpdateFile,
)
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors, nbytes
from fedproxy.round_files import joint_seal
from fedproxy.strategies.aggregators import Aggregator, RoundContext
from fedproxy.strategies.aggregators.survey import not_finite
from fedproxy.strategies.trainable.base import TrainableModel


def greet(sites: Sites, clients: Sequence[str]) -> dict[str, Facts]:
    """Ask every client what it is.

    Raises:
        ClientError: If a client does not answer.
    """
    asked = sites.ask(dict.fromkeys(clients, Hello()))
    return {answer.client_id: answer for answer in _expected(asked, Facts, "does not say what it is")}


def introduced(expected: Expected, facts: Mapping[str, Facts]) -> Expected:
    """Return what is expected of updates, completed by what clients said where the server does not know it."""
    rows = {client: said.rows for client, said in facts.items()} if expected.rows is None else expected.rows
    tokens = expected.target_tokens
    if tokens is None:
        tokens = max((said.target_tokens for said in facts.values()), default=None)
    own = {client: replace(form, rows=rows, target_tokens=tokens) for client, form in expected.own.items()}
    return replace(expected, rows=rows, target_tokens=tokens, own=own)


def rewind(sites: Sites, progress: Progress, clients: Sequence[str]) -> None:
    """Ask every client that keeps something to go back to where it was after the last round of ``progress``.

    Raises:
        CheckpointError: If what a client kept is missing, damaged, or not what the checkpoint was written with.
        ClientError: If a client does not answer.
    """
    changes = progress.files.get("changes", {})
    received = joint_seal([changes[str(number)] for number in range(1, progress.round) if str(number) in changes])
    messages: dict[str, Message] = {
        client: Rewind(progress.round, progress.kept_by(client), received)
        for client in clients
        if client in progress.kept or received
    }
    for _ in _expected(sites.ask(messages) if messages else (), Done, f"does not go back to round {progress.round}"):
        pass


def score(
    sites: Sites, progress: Progress, states: Mapping[str, Tensors], clients: Sequence[str]
) -> tuple[dict[str, dict[str, tuple[float, int]]], dict[str, str]]:
    """Score states on the rows that clients hold back.

    Args:
        sites: The clients.
        progress: The progress that tells what clients kept.
        states: Trainable states by name.
        clients: Who is asked.

    Returns:
        State to metric to its sum over all clients and the count, and why each client that did not answer did not.
    """
    sums: dict[str, dict[str, list[tuple[float, int]]]] = {state: {} for state in states}
    dropped: dict[str, str] = {}
    found = []
    with closing(sites.ask({client: Evaluate(progress.kept_by(client), states) for client in clients})) as answers:
        for answer in answers:
            if isinstance(answer, Sums):
                found.append(answer)
            else:
                dropped[answer.client_id] = _reason(answer) or "it answered what it was not asked"
    for answer in sorted(found, key=lambda answer: answer.client_id):
        for state, metrics in answer.by_state.items():
            for metric, pair in metrics.items():
                sums[state].setdefault(metric, []).append(pair)
    return {
        state: {
            metric: (math.fsum(total for total, _ in pairs), sum(count for _, count in pairs))
            for metric, pairs in metrics.items()
        }
        for state, metrics in sums.items()
    }, dropped


def assemble(
    model: TrainableModel,
    progress: Progress,
    aggregator: Aggregator,
    files: ServerFiles,
    sites: Sites,
    *,
    folder: Path | None = None,
) -> int:
    """Bring a model to the state of ``progress``: shared tensors, the frozen weights, and the mean of clients' own.

    Clients hand in the tensors that they kept to themselves once, for this; those that were in no round have none.

    Args:
        model: The model.
        progress: The progress.
        aggregator: The run's rule.
        files: Where the changes of the frozen weights lie.
        sites: The clients.
        folder: Folder of the server alone, for its copies of what comes as files; see :class:`Vault`.

    Returns:
        Bytes that clients handed in.

    Raises:
        CheckpointError: If a file that the state needs is damaged or missing.
        ClientError: If a client hands in nothing, what does not fit the state, or numbers that are not finite or too
            large.
    """
    if "base_change" in aggregator.parts and progress.round:
        files.changes.receive(model, progress.round, progress.remembered("base_change"))
    own = {name: tensor for name, tensor in progress.state.items() if not aggregator.shares(name)}
    means, handed = _mean_of_own(own, progress, aggregator, sites, folder) if own and progress.kept else ({}, 0)
    model.load_state({**progress.state, **means})
    return handed


def _mean_of_own(
    start: Mapping[str, Tensor], progress: Progress, aggregator: Aggregator, sites: Sites, folder: Path | None
) -> tuple[dict[str, Tensor], int]:
    """Return the clients' own tensors merged by a linear rule, and their bytes; one client's are held at a time."""
    clients = sorted(progress.kept)
    counts = [
        ClientUpdate(client, {}, progress.kept[client]["examples"], progress.kept[client]["tokens"])
        for client in clients
    ]
    weights = aggregator.linear_weights(counts, RoundContext(progress.round)).tolist()
    sums, handed = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in start.items()}, 0
    form = Form.of(Broadcast(progress.round, start), Expected())
    for (client, answer), weight in zip(_in_order(sites, progress, clients), weights, strict=True):
        try:
            own = admit(answer, form, Vault(folder)).delta
        except ClientError as error:
            raise ClientError(
                f"client {client!r} hands in other tensors of its own than the state has ({one_line(error, 160)}); "
                "start again with overwrite=true"
            ) from error
        handed += nbytes(own)
        for name, total in sums.items():
            change = (own[name] - start[name]).float()
            if not math.isfinite(size := largest(change)):
                raise not_finite(client, name)
            if size > LARGEST_WEIGHT:
                raise ClientError(
                    f"client {client!r}: tensor {name!r} of its own has moved by {size:.3g}, {LARGEST_WEIGHT:g} is the "
                    "most; have it hand in what it trained, then resume=auto"
                )
            total.add_(change, alpha=weight)
    return {name: start[name] + total.to(start[name].dtype) for name, total in sums.items()}, handed


def _in_order(
    sites: Sites, progress: Progress, clients: Sequence[str]
) -> Iterator[tuple[str, ClientUpdate | UpdateFile]]:
    """Yield what clients hand in, in their order; what comes early waits, as a file where it came as one."""
    early: dict[str, ClientUpdate | UpdateFile] = {}
    waiting = iter(clients)
    client = next(waiting)
    asked = sites.ask({client: Collect(progress.kept_by(client)) for client in clients})
    for answer in _expected(asked, ClientUpdate | UpdateFile, "hands in no tensors"):
        early[answer.client_id] = answer
        while client in early:
            yield client, early.pop(client)
            client = next(waiting, "")


def _expected(answers: Answers | tuple[()], kind: Any, fault: str) -> Iterator[Any]:
    """Yield answers of one kind.

    Raises:
        ClientError: Naming the client that gives another one.
    """
    with closing(answers) if answers else nullcontext():
        for answer in answers:
            if not isinstance(answer, kind):
                reason = _reason(answer)
                told = f": {reason}" if reason else ""
                raise ClientError(f"client {answer.client_id!r} {fault}{told}; mend that, then resume=auto")
            yield answer


def _reason(answer: Answer) -> str:
    return one_line(answer.reason) if isinstance(answer, Dropped) else ""

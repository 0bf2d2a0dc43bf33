"""Clients that are never merged: each goes on from a state of its own (the local-only baseline).

A :class:`Progress` of such a run holds every client's tensors side by side, as ``<client>/<name>``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from fedproxy.federation.checkpoint import Progress
from fedproxy.federation.engines.base import Answer
from fedproxy.federation.participation import OnAnswer
from fedproxy.protocol import ClientUpdate

Tensors = Mapping[str, Tensor]
OneRound = Callable[[str, Progress, OnAnswer], Progress]
"""Runs a round in which only that client takes part, from its own progress."""

_SUMS = ("upload_bytes", "download_bytes", "client_seconds", "server_seconds", "seconds")
_MEANS = ("train_loss", "regularizer_loss")
_LISTS = ("clients", "update_norms")


def spread(state: Tensors, clients: Iterable[str]) -> dict[str, Tensor]:
    """Return a state in which every client has its own copy of the same tensors."""
    return {f"{client}/{name}": tensor.clone() for client in sorted(clients) for name, tensor in state.items()}


def own(tensors: Tensors, client: str) -> dict[str, Tensor]:
    """Return one client's tensors under their plain names."""
    # A client's name, which is also its folder's, has no slash; a tensor's may (an optimizer's "momentum/weight").
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.partition("/")[0] == client}


def separate_round(before: Progress, chosen: Sequence[str], one_round: OneRound, on_client: OnAnswer) -> Progress:
    """Run one round for each chosen client by itself; the others keep what they have.

    Args:
        before: State and memories of all clients.
        chosen: The round's clients, sorted.
        one_round: Runs it for one of them.
        on_client: Called with every update, as in a round of all.
    """
    examples: dict[str, int] = {}

    def note(number: int, answer: Answer) -> None:
        if isinstance(answer, ClientUpdate):
            examples[answer.client_id] = answer.num_examples
        on_client(number, answer)

    parts = {client: one_round(client, _part(before, client), note) for client in chosen}
    merged: dict[str, Any] = {group: dict(getattr(before, group)) for group in _groups()}
    for client, part in parts.items():
        for group, tensors in merged.items():
            tensors |= {f"{client}/{name}": tensor for name, tensor in getattr(part, group).items()}
    records = [part.records[-1] for part in parts.values()]
    record = _joined(records, [examples.get(client, 0) for client in parts])
    return replace(before, round=before.round + 1, records=[*before.records, record], **merged)


def _part(before: Progress, client: str) -> Progress:
    groups: dict[str, Any] = {group: own(getattr(before, group), client) for group in _groups()}
    return replace(before, **groups)


def _groups() -> list[str]:
    """Return which fields of a progress hold tensors by name."""
    return [item.name for item in fields(Progress) if item.name not in ("round", "records")]


def _joined(records: Sequence[Mapping[str, Any]], examples: Sequence[int]) -> dict[str, Any]:
    """Return the round's one record: sums of bytes and seconds, losses as means over examples, norms by client."""
    record: dict[str, Any] = {"round": records[0]["round"]}
    for key in records[0]:
        values = [record_[key] for record_ in records]
        if key in _SUMS:
            record[key] = sum(values)
        elif key in _LISTS:
            record[key] = [value for value_list in values for value in value_list]
        elif key in _MEANS:
            known = [(value, count) for value, count in zip(values, examples, strict=True) if value is not None]
            total = sum(count for _, count in known)
            record[key] = sum(value * count for value, count in known) / total if total else None
    return record

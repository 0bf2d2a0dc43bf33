"""Bytes that cross the wire in a round, exact, from shapes alone: the round's parts run on the meta device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedproxy.federation.server.expected import expected_groups
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.protocol import Broadcast, nbytes
from fedproxy.strategies.round_parts import Forms, RoundPart


@dataclass(frozen=True)
class Messages:
    """Bytes of one client's messages."""

    first: int
    """What it receives in the first round."""
    later: int
    """What it receives in all others."""
    up: int
    """What it sends in a round."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client's messages, by what is in them; a round in which nobody is dropped."""

    clients: int
    """All clients of the federation."""
    drawn: int
    """Clients that take part in each round."""
    proxy: int
    """The proxy's weights, which every client gets once."""
    first: Mapping[str, int]
    """What one client receives in the first round: the shared ``state``, and by round part what rides with it."""
    later: Mapping[str, int]
    """The same in all other rounds."""
    to_all: int
    """What of ``later`` also goes to clients that are not in the round."""
    sent: Mapping[str, int]
    """What one client sends in a round: its ``delta``, and further groups."""
    collected: int
    """Tensors that a client kept to itself and hands in once, after the last round, if it took part in one."""
    parts: tuple[RoundPart, ...] = ()
    """What rides with the rounds."""
    own: Mapping[str, "Messages"] = field(default_factory=dict)
    """Messages of clients whose tensors have other shapes than all others', by name."""

    @classmethod
    def of(cls, outline: Outline) -> "Traffic":
        """Count them as the round loop sends them."""
        parts = outline.parts
        whole = {name: torch.empty_like(p, device="meta") for name, p in outline.trainable.parameters().items()}
        groups = expected_groups(parts, outline.trainable)
        forms = Forms(outline.rules, groups, outline.clients, outline.clients_in_round)
        first, later = Broadcast(1, whole), Broadcast(2, whole)
        for part in parts:
            first, later = part.send(first, {}), part.send(later, part.remembers(forms))
        return cls(
            clients=outline.clients,
            drawn=outline.clients_in_round,
            proxy=outline.proxy_parameters * outline.weight_bytes,
            first=_by_part(first),
            later=_by_part(later),
            to_all=sum(nbytes(later.extras.get(part.name, {})) for part in parts if part.to_all),
            sent={name: nbytes(group.tensors) for name, group in groups.items()},
            collected=nbytes({name: whole[name] for name in whole if not outline.rules.aggregator.shares(name)}),
            parts=parts,
            own={
                client: Messages(
                    first.addressed_to(client).bytes,
                    later.addressed_to(client).bytes,
                    sum(nbytes(g.tensors) for g in expected_groups(parts, outline.trainable, client).values()),
                )
                for part in parts
                for client in part.differs
            },
        )

    @property
    def up(self) -> int:
        """What one client sends in a round."""
        return sum(self.sent.values())

    def down(self, round_: int) -> int:
        """What one client of a round receives, rounds from 1."""
        return sum((self.first if round_ == 1 else self.later).values())

    def all_up(self) -> int:
        """What the server receives in a round."""
        return self._all(self.up, [own.up for own in self.own.values()])

    def all_down(self, round_: int) -> int:
        """What the server sends in a round; some parts also go to clients that rest."""
        resting = self.to_all * (self.clients - self.drawn) if round_ > 1 else 0
        own = [own.first if round_ == 1 else own.later for own in self.own.values()]
        return self._all(self.down(round_), own) + resting

    def _all(self, each: int, own: Sequence[int]) -> int:
        """Return the bytes of a round's clients; where not all are drawn, their mean over all clients counts."""
        total = each * (self.clients - len(own)) + sum(own)
        return total if self.drawn == self.clients else round(total * self.drawn / self.clients)


def _by_part(broadcast: Broadcast) -> dict[str, int]:
    return {"state": nbytes(broadcast.state), **{name: nbytes(group) for name, group in broadcast.extras.items()}}

"""Bytes that cross the wire in a round, exact, from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedproxy.federation.shared import own_tensors
from fedproxy.federation.statistics import statistics_bytes
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.protocol import nbytes
from fedproxy.strategies.functional.lowrank import A_SUFFIX, B_SUFFIX
from fedproxy.strategies.regularizers import Regularizer

_FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client's messages, by what is in them; a round in which nobody is dropped."""

    clients: int
    """All clients of the federation."""
    drawn: int
    """Clients that take part in each round."""
    proxy: int
    """The proxy's weights, which every client gets once."""
    state: int
    """The shared trainable state, in every broadcast."""
    emulator: int
    """Re-aligned frozen blocks, in every broadcast."""
    conflict: int
    """Last round's conflict map, in every broadcast but the first."""
    shared_memory: int
    """The server's half of a regularizer's memory (SCAFFOLD's c), in every broadcast but the first."""
    frozen_change: int
    """What the last round moved into the frozen weights, for *every* client, in every round but the first."""
    delta: int
    """A client's update."""
    own_memory: int
    """A regularizer's part of the upload (SCAFFOLD's change of c_k)."""
    statistics: int
    """Fisher or Gram statistics that the aggregator asks for, with every update."""
    collected: int
    """Tensors that a client kept to itself and hands in once, after the last round, if it took part in one."""

    @classmethod
    def of(cls, outline: Outline) -> "Traffic":
        """Count them as the round loop sends them."""
        rule, regularizer = outline.config.aggregator, outline.config.regularizer
        state: Mapping[str, Tensor] = {name: p.detach() for name, p in outline.trainable.parameters().items()}
        own = own_tensors(state, rule)
        shared = {name: tensor for name, tensor in state.items() if name not in own}
        upload, memory = _regularizer_bytes(regularizer, state, outline.clients)
        return cls(
            clients=outline.clients,
            drawn=outline.clients_in_round,
            proxy=outline.proxy_parameters * outline.weight_bytes,
            state=nbytes(shared),
            emulator=nbytes(outline.emulator),
            conflict=_floats(shared) if regularizer.needs_conflict else 0,
            shared_memory=memory,
            frozen_change=_frozen_change_bytes(outline, state),
            delta=nbytes(shared),
            own_memory=upload,
            statistics=statistics_bytes(rule.needs_extras, outline.trainable),
            collected=nbytes({name: state[name] for name in own}),
        )

    @property
    def up(self) -> int:
        """What one client sends in a round."""
        return self.delta + self.own_memory + self.statistics

    def down(self, round_: int) -> int:
        """What one client of a round receives, rounds from 1."""
        later = self.conflict + self.shared_memory + self.frozen_change if round_ > 1 else 0
        return self.state + self.emulator + later

    def all_up(self) -> int:
        """What the server receives in a round."""
        return self.up * self.drawn

    def all_down(self, round_: int) -> int:
        """What the server sends in a round; a change of the frozen weights also goes to clients that rest."""
        resting = self.frozen_change * (self.clients - self.drawn) if round_ > 1 else 0
        return self.down(round_) * self.drawn + resting


def _regularizer_bytes(regularizer: Regularizer, state: Mapping[str, Tensor], clients: int) -> tuple[int, int]:
    """Return the bytes that the regularizer uploads and that the server broadcasts for it, by running it on shapes."""
    if not (regularizer.keeps_client_memory or regularizer.keeps_shared_memory):
        return 0, 0
    _, upload = regularizer.finish({}, {}, state, steps=1, lr=1.0)
    shared = regularizer.merge_shared({}, [upload], clients) if regularizer.keeps_shared_memory else {}
    return nbytes(upload), nbytes(shared)


def _frozen_change_bytes(outline: Outline, state: Mapping[str, Tensor]) -> int:
    """Return the bytes of the float32 factors that a round moves into the frozen weights."""
    rule = outline.config.aggregator
    if not rule.moves_base:
        return 0
    total = 0
    for name, factor in state.items():
        if name.endswith((A_SUFFIX, B_SUFFIX)):
            rank, width = factor.shape if name.endswith(A_SUFFIX) else reversed(factor.shape)
            total += rule.base_rank(outline.clients_in_round, int(rank)) * int(width) * _FLOAT32
    return total


def _floats(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values()) * _FLOAT32

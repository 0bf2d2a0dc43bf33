"""What rides with a round beside the state: one class for each thing, with the server's half and the client's half.

The parts of a run form a chain. The server's :meth:`RoundPart.send` runs in the order of the chain and the client's
:meth:`RoundPart.receive` in the reverse order; on the way back :meth:`RoundPart.reply` runs in order and
:meth:`RoundPart.take` in reverse. So the last part is nearest to the wire, and each part sees what it would see alone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from torch import Generator, Tensor, device

from fedproxy.data.tokenisation import Example
from fedproxy.errors import ConfigError
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.registry import Component
from fedproxy.seeding import generator
from fedproxy.strategies.aggregators import Aggregation, Aggregator
from fedproxy.strategies.realignment import Realignment
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.trainable.base import TrainableModel


@dataclass(frozen=True)
class Group:
    """One group of tensors of an update, as the server expects it."""

    tensors: Tensors
    """Names, shapes and dtypes, on the meta device."""
    squares: bool = False
    """Sums of squares: the square root of the group's norm is in the units of an update, and is what is compared."""
    non_negative: bool = False
    """No value may be below zero."""
    masked: bool = False
    """Values say nothing until all clients' are added up."""
    figures: bool = False
    """Figures, not vectors: they are finite, and their lengths are not compared."""


@dataclass(frozen=True)
class Rules:
    """What decides which parts a run has."""

    aggregator: Aggregator
    regularizer: Regularizer
    realignment: Realignment
    model: TrainableModel
    """The proxy with what is trained attached; it may be on the meta device."""
    added: Collection["RoundPart"] = ()
    """Parts that the recipe adds."""


@dataclass(frozen=True)
class Forms:
    """What can be known of a round before there is one: shapes on the meta device."""

    rules: Rules
    up: Mapping[str, Group]
    """What a client sends, by group."""
    clients: int
    """All clients of the federation."""
    drawn: int
    """Clients of a round."""


class BaseHistory(Protocol):
    """The changes of the frozen weights that a party has received, in files."""

    def receive(self, model: TrainableModel, round_: int, change: Tensors) -> None:
        """Keep the change of a round, and bring a model's frozen weights to that round."""
        ...


@dataclass
class ClientRound:
    """One client's work in one round, as its parts see it and add to it."""

    client_id: str
    broadcast: Broadcast
    """What came; a part that decodes it puts the decoded one in its place."""
    model: TrainableModel
    initial: Tensors
    """The state that the model was attached with, the same for all clients."""
    state: dict[str, Tensor]
    """Where training starts from."""
    memory: Mapping[str, Tensors]
    """What each part kept after this client's last round, by part."""
    examples: Sequence[Example]
    pad_id: int
    base: BaseHistory
    device: device
    """Where statistics are computed."""
    conflict: Tensors | None = None
    """For the regularizer: conflict C of the previous round (FedProxy Eq 7)."""
    pull: Tensors | None = None
    """For the regularizer: its constant gradient of this round."""
    kept: dict[str, Tensors] = field(default_factory=dict)
    """What each part keeps for this client's next round, by part."""
    lr: float = 1.0
    """Learning rate; after training the mean over its steps."""
    seed: int = 0
    """Seed of this client's own draws in this round (:class:`fedproxy.seeding.ClientSeeds`)."""
    steps: int = 0
    """Optimiser steps done; known after training."""
    ledger: Path | None = None
    """Folder of privacy ledgers beside this client's data."""
    signing: Path | None = None
    """Folder of this client's signing secret and of the keys that it has pinned."""
    privacy: Any = None
    """What the part ``privacy`` charged for this round."""
    released: tuple[Tensors, Tensors] | None = None
    """What it released before for the same request, and figures beside it: then there is no need to train."""
    training: Any = None
    """How rows are sampled and noised (:class:`fedproxy.privacy.dp_sgd.PrivateTraining`); None trains as usual."""
    writes: bool = True
    """False in further processes that train the same client: they compute what the first one sends."""

    def generator(self, purpose: str) -> Generator:
        """Return a generator for one purpose of this client in this round."""
        return generator(self.seed, purpose)


@dataclass(frozen=True)
class RoundResult:
    """What the server has after a round."""

    round: int
    clients: int
    """All clients of the federation, in the round or not."""
    broadcast: Broadcast
    """What was sent."""
    updates: Sequence[ClientUpdate]
    """In sorted client order; a secure sum is one update."""
    aggregation: Aggregation
    figures: dict[str, Any] = field(default_factory=dict)
    """Further figures of the round's record; parts add theirs."""
    received: Sequence[ClientUpdate] = ()
    """What each client sent, of which ``updates`` may be the sum alone."""


@dataclass(frozen=True)
class RoundPart(Component, family="round_part"):
    """Base of everything that rides with a round; a member's fields are its options, as plain values.

    Members override what they need: every method does nothing by default.
    """

    order: ClassVar[int] = 50
    """Place in the chain; lower ones come first, equal ones by name."""
    optional: ClassVar[bool] = False
    """A recipe may add it; other parts are named by the rules that need them."""
    to_all: ClassVar[bool] = False
    """What is sent also reaches clients that are not in the round."""
    server_copies: ClassVar[int] = 0
    """How often the server holds what it sends for this part at once, for ``plan``."""
    host_copies: ClassVar[int] = 0
    """Copies of the trainable state that a client holds for this part in its memory, for ``plan``."""
    device_copies: ClassVar[int] = 0
    """Those that it holds on its accelerator while it trains."""

    def require(self, option: str, ok: bool, rule: str) -> None:
        """Raise a one-line ConfigError about ``option`` unless ``ok``."""
        if not ok:
            raise ConfigError(f"parts.{self.name}.{option} must be {rule}, got {getattr(self, option)!r}")

    @property
    def differs(self) -> Collection[str]:
        """The clients whose updates have another form than all others', by name."""
        return ()

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """Return the part as the run's rules need it."""
        return cls()

    def send(self, broadcast: Broadcast, memory: Tensors) -> Broadcast:
        """Return the broadcast with what this part adds or changes; the server's side.

        Args:
            broadcast: As the parts before left it.
            memory: What :meth:`collect` returned last; empty before the first round.
        """
        return broadcast

    def seen(self, broadcast: Broadcast) -> Broadcast:
        """Return a broadcast as a client reads it; a part that encodes what is sent decodes it here."""
        return broadcast

    def receive(self, task: ClientRound) -> None:
        """Take in what the broadcast carries, before training; the client's side."""

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Return the update with what this part adds or changes, after training; the client's side."""
        return update

    def take(self, update: ClientUpdate, broadcast: Broadcast) -> ClientUpdate:
        """Return an update that passed all checks in the form that rules read; the server's side."""
        return update

    def verify(self, update: ClientUpdate, memory: Tensors) -> None:
        """Compare an update with what the server remembers; the server's side.

        Raises:
            ClientError: If they do not go together; the client is dropped.
        """

    def gather(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """Return all updates of a round that passed the checks in the form in which they are merged; the server's side.

        Args:
            updates: In sorted client order.
        """
        return updates

    def told(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        """Return figures for the round's record that stand in its updates, of which there is one at least."""
        return {}

    def collect(self, memory: Tensors, result: RoundResult) -> Tensors:
        """Return the server's memory of this part after a round: it is checkpointed."""
        return {}

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Return the groups of tensors that an update has, given those without this part.

        Args:
            up: By group; the update itself is the group ``delta``.
            model: The proxy with what is trained attached; its values play no part.
            client_id: Whose update it is.
        """
        return up

    def remembers(self, forms: Forms) -> Tensors:
        """Return the forms, on the meta device, of :meth:`collect`'s result after a round."""
        return {}


def described(part: RoundPart) -> dict[str, Any]:
    """Return a part's name and options as plain values, for the client; what is bound to the server stays out."""
    options = {item.name: getattr(part, item.name) for item in fields(part) if not item.metadata.get("server")}
    return {"name": part.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}


def made(node: Mapping[str, Any]) -> RoundPart:
    """Return the part that :func:`described` described."""
    return RoundPart.made(node)


def chain(parts: Sequence[RoundPart]) -> tuple[RoundPart, ...]:
    """Return parts in the order of the chain."""
    return tuple(sorted(parts, key=lambda part: (part.order, part.name)))


def parts_of(rules: Rules) -> tuple[RoundPart, ...]:
    """Return the parts that the run's rules name, in the order of the chain.

    Raises:
        ConfigError: If a rule leaves clients tensors of their own and names no part for them.
    """
    named = {*rules.aggregator.parts, *rules.regularizer.parts, *rules.realignment.parts}
    if "personal" not in named and not all(map(rules.aggregator.shares, rules.model.parameters())):
        raise ConfigError(
            f"aggregator.name: {rules.aggregator.name!r} leaves clients tensors of their own and does not name the "
            "round part 'personal'; add it to the rule's parts"
        )
    return chain([*(RoundPart.by_name(name).of(rules) for name in named), *rules.added])

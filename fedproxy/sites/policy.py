"""What the owner of the data allows: looked at by the site's own process, whatever the server asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fedproxy.errors import ConfigError
from fedproxy.sites.privacy_rules import budget_fault, clip_of, parts_of
from fedproxy.wire.messages import Setup

if TYPE_CHECKING:
    from fedproxy.protocol import ClientUpdate

_ACCOUNTS = ("privacy", "secure_sum", "sign_sums")
"""Groups beside an update that say no more of a row: its ledger's charge, a masked weight, its signs and magnitudes."""


class NotAllowedError(Exception):
    """The policy does not allow what was asked; the text names the rule and nothing of the data."""


@dataclass(frozen=True)
class Policy:
    """What may be done with a site's rows, and what may leave it."""

    trainables: list[str] = field(default_factory=lambda: ["lora"])
    """What may be trained."""
    most_rounds: int = 100
    """Highest round of a run in which the site takes part."""
    most_epochs: int = 3
    """Most passes over the rows in one round."""
    least_rows: int = 1
    """Clients with fewer rows take no part."""
    largest_mib: int = 2048
    """Largest file in MiB that is taken in or sent out: the proxy, a round's broadcast, a round's updates."""
    figures: Literal["losses", "counts"] = "losses"
    """What leaves beside the update: training losses and counts of rows and tokens, or the counts alone."""
    statistics: bool = False
    """Whether groups of tensors beside the update may leave, as Fisher, Gram and SCAFFOLD rules ask for them."""
    most_clip: float | None = None
    """Updates, or rows' gradients with privacy.unit=example, must be clipped to at most this norm (parts.clip_noise or
    privacy.clip); null does not ask for it."""
    most_epsilon: float | None = None
    """Most of privacy.epsilon, over all runs on these rows, which the site's own ledgers keep; null asks for none."""
    most_delta: float = 1e-5
    """Most of privacy.delta, where most_epsilon is set: well below one over the number of rows or clients."""
    unit: Literal["any", "example", "client"] = "any"
    """What privacy.unit must protect, where most_epsilon is set."""
    secure: bool = False
    """Whether updates must be masked, so that the server learns sums alone (privacy.secure_aggregation)."""
    plugins: list[str] = field(default_factory=list)
    """Modules that may be imported for the components of a run; none unless listed."""
    personal: bool = True
    """Whether personal tensors, which some rules leave at clients, may be handed in after the last round."""
    evaluate: bool = True
    """Whether states may be scored on the rows that are held back; sums and counts leave."""
    least_held_out: int = 20
    """Fewest values that a sum may be over."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            ConfigError: Naming the first that cannot be.
        """
        for key in ("most_rounds", "most_epochs", "least_rows", "largest_mib", "least_held_out"):
            if getattr(self, key) < 1:
                raise ConfigError(f"policy.{key} must be at least 1, got {getattr(self, key)}")
        if self.most_clip is not None and self.most_clip <= 0:
            raise ConfigError(f"policy.most_clip must be positive, or null, got {self.most_clip}")
        if self.most_epsilon is not None and not self.most_epsilon > 0:
            raise ConfigError(f"policy.most_epsilon must be positive, or null, got {self.most_epsilon}")
        if not 0 < self.most_delta < 1:
            raise ConfigError(f"policy.most_delta must be in (0, 1), got {self.most_delta}")
        if self.most_epsilon is not None and self.evaluate:
            raise ConfigError(
                "policy.evaluate must be false where policy.most_epsilon is set, got true: scores on held-out rows are "
                "not accounted for"
            )

    @property
    def most_bytes(self) -> int:
        """Largest file in bytes."""
        return self.largest_mib << 20

    def check_setup(self, setup: Setup) -> None:
        """Refuse a run whose clients would train what is not allowed, or need code that is not listed.

        Raises:
            NotAllowedError: Naming the rule.
        """
        name = setup.trainable["name"]
        if name not in self.trainables:
            raise NotAllowedError(f"policy.trainables allows {', '.join(self.trainables)}, not {name}")
        foreign = sorted(set(setup.plugins).difference(self.plugins))
        if foreign:
            raise NotAllowedError(f"policy.plugins does not list {foreign[0]}")
        if self.most_epsilon is not None and self.unit != "client" and setup.long_rows == "split":
            raise NotAllowedError("policy.most_epsilon protects rows, and data.long_rows=split makes several of one")
        if setup.proxy_bytes > self.most_bytes:
            raise NotAllowedError(f"policy.largest_mib is {self.largest_mib}, the proxy has more")

    def check_round(self, round_: int, job: Mapping[str, Any]) -> None:
        """Refuse a round that asks for more than is allowed.

        Raises:
            NotAllowedError: Naming the rule.
        """
        epochs = job.get("epochs")
        if round_ > self.most_rounds:
            raise NotAllowedError(f"policy.most_rounds is {self.most_rounds}, this is round {round_}")
        if type(epochs) is not int or not 1 <= epochs <= self.most_epochs:
            raise NotAllowedError(f"policy.most_epochs is {self.most_epochs}, the round asks for {epochs!r}")
        parts = parts_of(job)
        if self.most_clip is not None:
            self._check_clip(clip_of(parts))
        fault = ""
        if self.most_epsilon is not None:
            fault = budget_fault(parts, self.most_epsilon, self.most_delta, self.unit)
        if not fault and self.secure and not any(part.get("name") == "secure_sum" for part in parts):
            fault = "policy.secure lets no update leave that is not masked; use privacy.secure_aggregation=true"
        if fault:
            raise NotAllowedError(fault)

    def _check_clip(self, clip: Any) -> None:
        if not isinstance(clip, int | float) or not 0 < clip <= (self.most_clip or 0):
            raise NotAllowedError(
                f"policy.most_clip is {self.most_clip}; use parts.clip_noise.clip or privacy.clip of at most that"
            )

    def allowed(self, update: "ClientUpdate") -> "ClientUpdate":
        """Return an update without the figures that may not leave.

        Raises:
            NotAllowedError: If it holds statistics that may not.
        """
        beside = sorted(set(update.extras).difference(_ACCOUNTS))
        if beside and not self.statistics:
            raise NotAllowedError(f"policy.statistics does not let {beside[0]!r} leave")
        return (
            update if self.figures == "losses" else replace(update, train_loss=None, regularizer_loss=None, seconds=0.0)
        )

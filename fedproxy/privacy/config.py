"""What a recipe promises about its clients' privacy: the node ``privacy``."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from fedproxy.errors import ConfigError
from fedproxy.privacy.accounting import MOST_EPSILON, MOST_NOISE


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of what clients send, with a budget that clients keep a ledger of."""

    unit: Literal["none", "example", "client"] = "none"
    """What is protected: nothing, one row of a client (DP-SGD), or a whole client (clipped updates with noise)."""
    epsilon: float | None = None
    """Budget over all rounds, and over all runs that count in one ledger, at most 1000; null sets no bound."""
    delta: float | None = None
    """Chance by which the promise may fail, in (0, 1): well below one over the number of rows or clients."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise in units of ``clip``; null takes the least that keeps the budget."""
    clip: float | None = 1.0
    """Largest L2 norm of what one unit adds: a row's gradient or a client's update; null does not clip."""
    quantile: float | None = None
    """Share of clients whose updates stay whole, in (0, 1): from ``clip`` on, the clip follows it from round to round,
    at 5 % more noise; with unit client. Null keeps ``clip``."""
    accountant: Literal["pld", "rdp"] = "pld"
    """How epsilon is computed (dp-accounting): privacy loss distributions, or Rényi divergences, quicker and looser."""
    sampling: Literal["auto", "poisson", "without_replacement", "none"] = "auto"
    """Draw that the accountant may count on: of rows ``poisson``; of clients ``none``, as the server knows who is
    drawn, or ``without_replacement`` with noise at the server, if the draw stays secret."""
    noise_at: Literal["client", "server"] = "client"
    """Who adds the noise of unit client: each client to its own update, or a server that all trust to their sum."""
    physical_batch: int | None = None
    """Rows whose gradients are held at once, for unit example; null is client.batch_size."""
    ledger: str | None = None
    """Folder of the clients' ledgers; null is beside their data: the folder of data.files, or else the run's own."""
    secure_aggregation: bool = False
    """Whether the server learns the sum of a round's updates alone, with any unit; for linear rules."""
    largest: float = 1.0
    """Largest magnitude of a number of an update in a secure sum, which has 31 bits for all clients' together."""
    peers: dict[str, str] = field(default_factory=dict)
    """Signing keys of clients at real sites, as ``peers`` of a site's file: with them the server drops a client whose
    key share its peers would refuse."""
    test_seed: int | None = None
    """Draws noise that can be repeated and foreseen, for tests; null draws from a secret of each client."""

    def __post_init__(self) -> None:
        """Check the options."""
        self._require("largest", 0 < self.largest < math.inf, "positive")
        for peer, key in self.peers.items():
            if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
                raise ConfigError(f"privacy.peers.{peer} must be the 64 digits that its site's check shows")
        if self.secure_aggregation and self.noise_at == "server":
            raise ConfigError(
                "privacy.noise_at must be client with privacy.secure_aggregation, got 'server': it sees no update"
            )
        if self.unit == "none":
            for key in ("epsilon", "delta", "noise_multiplier", "quantile", "ledger", "test_seed"):
                if getattr(self, key) is not None:
                    raise ConfigError(f"privacy.unit must be example or client where privacy.{key} is set, got none")
            return
        self._check_numbers()
        self._check_sampling()
        self._check_quantile()

    @property
    def on(self) -> bool:
        """Whether anything is clipped, noised or withheld."""
        return self.unit != "none" and not (self.noise_multiplier == 0 and self.clip is None)

    @property
    def counted_sampling(self) -> str:
        """The draw that is accounted for: poisson, without_replacement or none."""
        if self.sampling != "auto":
            return self.sampling
        return "poisson" if self.unit == "example" else "none"

    def _check_numbers(self) -> None:
        for key in ("epsilon", "delta", "noise_multiplier"):
            value = getattr(self, key)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"privacy.{key} must be finite, got {value}")
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(f"privacy.epsilon or privacy.noise_multiplier must be set with privacy.unit={self.unit}")
        budget, noise = self.epsilon, self.noise_multiplier
        self._require("epsilon", budget is None or budget > 0, "positive, or null")
        self._require(
            "epsilon", budget is None or budget <= MOST_EPSILON, f"at most {MOST_EPSILON:g}, or null for no bound"
        )
        self._require("noise_multiplier", noise is None or noise >= 0, "at least 0")
        self._require("noise_multiplier", noise is None or noise <= MOST_NOISE, f"at most {MOST_NOISE:g}")
        self._require("clip", self.clip is None or self.clip > 0, "positive, or null")
        if self.clip is None and self.noise_multiplier != 0:
            raise ConfigError("privacy.clip must be a number where there is noise, got null; noise is in units of it")
        if self.noise_multiplier == 0 and self.epsilon is not None:
            raise ConfigError(
                "privacy.noise_multiplier must be above 0 to keep privacy.epsilon, got 0; remove one of them"
            )
        if self.delta is None and self.noise_multiplier != 0:
            raise ConfigError(
                "privacy.delta must be set, as epsilon alone is no promise here: a number well below one over the "
                f"number of {'rows' if self.unit == 'example' else 'clients'}, such as 1e-5; got null"
            )
        self._require("delta", self.delta is None or 0 < self.delta < 1, "in (0, 1)")
        self._require("physical_batch", self.physical_batch is None or self.physical_batch >= 1, "at least 1, or null")

    def _check_sampling(self) -> None:
        allowed = ("auto", "poisson") if self.unit == "example" else ("auto", "none", "without_replacement")
        if self.sampling not in allowed:
            raise ConfigError(
                f"privacy.sampling must be one of {', '.join(allowed)} with privacy.unit={self.unit}, got "
                f"{self.sampling!r}"
            )
        if self.unit == "example" and self.noise_at == "server":
            raise ConfigError("privacy.noise_at must be client with privacy.unit=example, got 'server'")
        if self.sampling != "without_replacement":
            return
        if self.noise_at == "client":
            raise ConfigError(
                "privacy.sampling must be none where clients add the noise, got 'without_replacement': the server sees "
                "who was drawn; use privacy.noise_at=server"
            )
        if self.accountant != "rdp":
            raise ConfigError("privacy.accountant must be rdp with privacy.sampling=without_replacement, got 'pld'")

    def _check_quantile(self) -> None:
        if self.quantile is None:
            return
        self._require("quantile", 0 < self.quantile < 1, "in (0, 1), or null")
        if self.unit != "client":
            raise ConfigError(
                f"privacy.quantile must be null with privacy.unit=example, got {self.quantile}: it is of clients' "
                "updates; set privacy.clip for the gradients of rows"
            )
        if self.clip is None:
            raise ConfigError("privacy.clip must be a number with privacy.quantile, got null: it is the first round's")
        if self.secure_aggregation:
            raise ConfigError(
                f"privacy.quantile must be null with privacy.secure_aggregation, got {self.quantile}: how many updates "
                "were within the clip is no part of the sum"
            )

    def _require(self, key: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ConfigError(f"privacy.{key} must be {rule}, got {getattr(self, key)!r}")

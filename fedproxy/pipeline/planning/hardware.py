"""What a plan is made for: devices, links and the lengths of rows, as ``plan.KEY=VALUE`` words of the command."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from fedproxy.config.loading import parse_arguments
from fedproxy.config.values import typed
from fedproxy.errors import ConfigError, nearest

_PREFIX = "plan."
MEASURE = "measure"


@dataclass(frozen=True)
class Hardware:
    """Devices, links and rows; the defaults are assumptions, and a plan says so."""

    devices: int | None = None
    """Devices that a round's clients share, each with trainer.devices of them at a time; null takes those of one
    client. In the field: of all clients of a round together."""
    tflops: str = "100"
    """TFLOP/s that a device sustains in training, or ``measure`` to time two blocks of the target on this machine."""
    client_mbps: float | None = 100.0
    """Mbit/s of a client's link, each way; null where clients and server are one machine."""
    server_mbps: float = 1000.0
    """Mbit/s of the server's link, each way, shared by a round's clients."""
    merge_gb_per_s: float = 0.5
    """GB of updates that the server merges per second."""
    rows: int | None = None
    """Rows of a client; null takes data.rows_per_task, dealt out by data.partition."""
    input_tokens: int | None = None
    """Tokens of a prompt; null takes data.max_input_tokens, the most there can be."""
    target_tokens: int | None = None
    """Tokens of an answer; null takes data.max_target_tokens."""

    def __post_init__(self) -> None:
        """Check that all figures are positive; else a ConfigError."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "tflops":
                self._check_tflops()
            elif value is not None and not value > 0:
                raise ConfigError(f"{_PREFIX}{item.name} must be positive, got {value}")

    def _check_tflops(self) -> None:
        try:
            ok = self.tflops == MEASURE or float(self.tflops) > 0
        except ValueError:
            ok = False
        if not ok:
            raise ConfigError(f"{_PREFIX}tflops must be a positive number or {MEASURE}, got {self.tflops!r}")

    @classmethod
    def split(cls, arguments: Sequence[str]) -> tuple["Hardware", list[str]]:
        """Return the hardware that ``plan.`` words describe, and the words that are left for the recipe.

        Raises:
            ConfigError: If a key is unknown or a value does not fit.
        """
        words = [word for word in arguments if word.startswith(_PREFIX)]
        rest = [word for word in arguments if not word.startswith(_PREFIX)]
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, value in parse_arguments(words, _Words).get("plan", {}).items():
            if key not in hints:
                raise ConfigError(f"{_PREFIX}{key}: unknown key{nearest(key, hints)}")
            values[key] = typed(hints[key], value, f"{_PREFIX}{key}")
        return cls(**values), rest


@dataclass(frozen=True)
class _Words:
    """The command's words, as :func:`fedproxy.config.loading.parse_arguments` asks for them."""

    plan: Hardware

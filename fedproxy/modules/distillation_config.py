"""The options of distillation."""

from dataclasses import dataclass, fields
from typing import Literal

from fedproxy.errors import ConfigError
from fedproxy.modules.divergence import DivergenceName

MOST_RANK = 1 << 16
"""Largest rank of LoRA: more than the smaller side of any model's matrix."""


@dataclass(frozen=True)
class DistillationConfig:
    """Knowledge distillation from target into proxy on calibration text, before any client sees the proxy."""

    steps: int = 0
    """Optimiser steps; 0 skips distillation."""
    rows: int = 1000
    """Rows of compression.calibration.path to distil on."""
    batch_size: int = 16
    """Texts per step."""
    lr: float = 3e-4
    """Learning rate of AdamW, constant; less for models of billions of parameters."""
    train: Literal["full", "lora"] = "full"
    """All weights of the proxy's blocks, or LoRA on all their linear layers, merged at the end."""
    lora_r: int = 32
    """Rank where train is lora."""
    lora_alpha: float = 64.0
    """Scale alpha / r where train is lora."""
    divergence: DivergenceName = "forward_kl"
    """Between next-token distributions: KL(target || proxy), KL(proxy || target) or Jensen-Shannon."""
    temperature: float = 1.0
    """Softens the distributions of both models."""
    kl_weight: float = 1.0
    """Weight of the divergence."""
    hidden_weight: float = 0.0
    """Weight of the distance between kept blocks' hidden states, RMS-normalised."""
    cache_teacher: bool = False
    """Keep the target's outputs on disk (in FEDPROXY_CACHE), for further epochs, proxies and runs."""
    top_k: int = 64
    """Tokens that the cache keeps of each distribution; all others together are one more outcome."""
    cache_gib: float = 8.0
    """Largest size of the cache, in GiB."""

    def __post_init__(self) -> None:
        """Check the ranges, and that no option is set where nothing is distilled; else a ConfigError."""
        for key, low in (("steps", 0), ("rows", 1), ("batch_size", 1), ("lora_r", 1), ("top_k", 1)):
            self._require(key, getattr(self, key) >= low, f"at least {low}")
        self._require("lora_r", self.lora_r <= MOST_RANK, f"at most {MOST_RANK}")
        for key in ("lr", "temperature", "lora_alpha", "cache_gib"):
            self._require(key, getattr(self, key) > 0, "positive")
        for key in ("kl_weight", "hidden_weight"):
            self._require(key, getattr(self, key) >= 0, "at least 0")
        self._require("kl_weight", self.kl_weight + self.hidden_weight > 0, "positive if hidden_weight is 0")
        odd = [item.name for item in fields(self) if item.name != "steps" and getattr(self, item.name) != item.default]
        if self.steps == 0 and odd:
            raise ConfigError(
                f"distillation.steps must be at least 1 where distillation.{odd[0]} is set, got 0; set "
                f"distillation.steps, or leave distillation.{odd[0]} out"
            )

    def _require(self, key: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ConfigError(f"distillation.{key} must be {rule}, got {getattr(self, key)!r}")

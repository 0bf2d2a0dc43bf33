"""What a run needs so that its server can re-align the proxy's frozen blocks."""

from collections.abc import Container
from typing import TYPE_CHECKING

from fedproxy.config import RunConfig
from fedproxy.errors import ConfigError
from fedproxy.models.decoder import positions_limit
from fedproxy.modules.devices import one_device
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.strategies.realignment import Material
from fedproxy.strategies.round_parts.emulator import Aligner
from fedproxy.strategies.trainable.base import TrainableModel

if TYPE_CHECKING:
    from fedproxy.pipeline.stages import Run


def check_realignment(config: RunConfig) -> None:
    """Refuse a re-alignment that has nothing to align, before anything is loaded.

    Raises:
        ConfigError: One line that names key, rule and way out.
    """
    rows, _ = config.realignment.reads
    name = config.realignment.name
    if not rows:
        return
    if getattr(config.trainable, "blocks", None) == "all":
        raise ConfigError(
            f"realignment.name={name} needs blocks that no client trains, but trainable.blocks is 'all'; "
            "set trainable.blocks (ends, last or a list), or realignment.name=none"
        )
    if not config.aggregator.aggregates or "base_change" in config.aggregator.parts:
        raise ConfigError(
            f"realignment.name={name} needs one adapter that all clients share on weights that stay, which "
            f"aggregator.name={config.aggregator.name} does not give; use another aggregator or realignment.name=none"
        )
    if config.fusion.keeps_proxy:
        raise ConfigError(
            f"fusion.name={config.fusion.name} ends with the tuned proxy, but realignment.name={name} moves blocks of "
            "it that nobody tunes; use fusion.name=plug_in, or realignment.name=none"
        )


def aligner(run: "Run", model: TrainableModel, owned: Container[str]) -> Aligner | None:
    """Return what aligns the proxy before every broadcast, or None where the recipe asks for nothing."""
    config = run.config
    rows, batch_size = config.realignment.reads
    if not rows:
        return None
    target, tokenizer = run.target()
    calibration = config.compression.calibration
    texts = public_texts(calibration, owned, rows=rows, seed=config.seed)
    limit = positions_limit(target, calibration.max_tokens)
    material = Material(
        target=target,
        layer_map=run.layer_map(),
        batches=text_batches(texts, tokenizer, max_tokens=limit, batch_size=batch_size),
        trainer=one_device(config.trainer),
        logs=run.folder.trainer_logs / "realignment",
    )
    return Aligner(config.realignment, model, material, seed=config.seed)

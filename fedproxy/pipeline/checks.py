"""What can be known to be wrong with a compression before a model is loaded and before anything is written."""

from collections.abc import Container

import torch

from fedproxy.config import RunConfig
from fedproxy.data.assets import resolve
from fedproxy.data.sources import read_texts
from fedproxy.errors import ConfigError, ModelError
from fedproxy.models import Decoder, load_tokenizer
from fedproxy.models.checkpoints import check_tokenizer
from fedproxy.models.loading import build
from fedproxy.modules.distillation import require_float32
from fedproxy.modules.teacher import check_top_k, vocabulary_size
from fedproxy.pipeline.data import check_held_out, public_texts, texts_read
from fedproxy.pipeline.planning.outline import target_config
from fedproxy.strategies.compression.healing import NEEDS_GAPS


def check_compression(config: RunConfig, *, trains: bool = False) -> None:
    """Refuse a target that cannot be compressed, and options of compression, healing and distillation that do not fit.

    Args:
        config: The recipe.
        trains: Whether clients will train: then what they train must fit, too.

    Raises:
        ConfigError: If an option does not fit the target, or healing the compressor.
        ModelError: If the target is no decoder that the compressor can work on, or its tokenizer another model's.
    """
    if config.healing.rows and not config.compression.leaves_gaps:
        raise ConfigError(NEEDS_GAPS)
    shape = target_config(config)
    with torch.device("meta"):
        try:
            target = build(shape, getattr(torch, config.target.dtype))
        except ModelError as error:
            raise ModelError(f"target.path={config.target.path}: {error}") from error
        config.compression.outline(Decoder.of(target))
        if trains:
            config.trainable.check(Decoder.of(target))
    path = resolve(config.target.path) or config.target.path
    check_tokenizer(target, load_tokenizer(path), config.target.path)
    settings = config.distillation
    if settings.steps and settings.train == "full":
        require_float32(target, "distillation.train=full", "distillation.train=lora")
    if settings.steps and settings.cache_teacher:
        check_top_k(settings.top_k, vocabulary_size(target))


def check_public(config: RunConfig, owned: Container[str]) -> None:
    """Refuse calibration text of which nothing is left without the clients' rows.

    Args:
        config: The recipe.
        owned: Clients' texts.

    Raises:
        DataError: If nothing is left for compression, healing or distillation.
    """
    calibration, distilled = config.compression.calibration, config.distillation.steps and config.distillation.rows
    for rows in {calibration.rows, config.healing.rows, distilled} - {0}:
        public_texts(calibration, owned, rows=rows, seed=config.seed)


def check_calibration(config: RunConfig, *, held_out: bool = False) -> None:
    """Refuse calibration text that cannot be read, or too little of it.

    Args:
        config: The recipe.
        held_out: Whether more texts are needed than compression reads, to measure fidelity on.

    Raises:
        DataError: If it cannot be read, a text is empty, or there are too few.
        AssetError: If it is an asset that is unknown or cannot be fetched.
    """
    calibration, rows = config.compression.calibration, texts_read(config)
    read_texts(calibration.path, rows, config.seed)
    if held_out:
        check_held_out(calibration, used=rows)

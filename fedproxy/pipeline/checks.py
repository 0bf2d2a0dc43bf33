"""What can be known to be wrong with a compression from shapes alone, before anything is loaded or written."""

import torch
from transformers import AutoModelForCausalLM

from fedproxy.config import RunConfig
from fedproxy.models import Decoder
from fedproxy.modules.distillation import require_float32
from fedproxy.modules.teacher import check_top_k, vocabulary_size
from fedproxy.pipeline.planning.outline import target_config


def check_compression(config: RunConfig) -> None:
    """Refuse a target that cannot be compressed, and options of compression or distillation that do not fit it.

    Raises:
        ConfigError: If an option does not fit the target.
        ModelError: If the target is no decoder that the compressor can work on.
    """
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config(config), dtype=getattr(torch, config.target.dtype))
        config.compression.outline(Decoder.of(target))
    settings = config.distillation
    if settings.steps and settings.train == "full":
        require_float32(target, "distillation.train=full", "distillation.train=lora")
    if settings.steps and settings.cache_teacher:
        check_top_k(settings.top_k, vocabulary_size(target))

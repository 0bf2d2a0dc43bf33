"""What can be known to be wrong with a compression from shapes alone, before anything is loaded or written."""

import torch
from transformers import AutoModelForCausalLM

from fedproxy.config import RunConfig
from fedproxy.models import Decoder
from fedproxy.pipeline.planning.outline import target_config


def check_compression(config: RunConfig) -> None:
    """Refuse a target that cannot be compressed, or options that do not fit it.

    Raises:
        ConfigError: If an option does not fit the target.
        ModelError: If the target is no decoder that the compressor can work on.
    """
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config(config))
        config.compression.outline(Decoder.of(target))

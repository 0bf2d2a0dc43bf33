"""What can be known to be wrong with a compression from shapes alone, before anything is loaded or written."""

import torch
from transformers import AutoModelForCausalLM

from fedproxy.config import RunConfig
from fedproxy.errors import ModelError
from fedproxy.models import Decoder
from fedproxy.models.checkpoints import first_line, without_reports
from fedproxy.pipeline.planning.outline import target_config


def check_compression(config: RunConfig) -> None:
    """Refuse a target that cannot be compressed, or options that do not fit it.

    Raises:
        ConfigError: If an option does not fit the target.
        ModelError: If the target is no decoder that the compressor can work on.
    """
    shape = target_config(config)
    with torch.device("meta"):
        try:
            with without_reports():
                target = AutoModelForCausalLM.from_config(shape)
        except Exception as error:  # a family's own checks raise whatever they like
            raise ModelError(
                f"target.path={config.target.path} ({shape.model_type}) cannot be built: {first_line(error)}; "
                "give a decoder-only causal LM"
            ) from error
        config.compression.outline(Decoder.of(target))

"""Frozen weights in 8 or 4 bits, for clients whose device is too small for the proxy (QLoRA)."""

import importlib.util
import logging
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from fedproxy.errors import ConfigError
from fedproxy.models.loading import load_weights

_DEVICES = ("cuda", "cpu", "xpu")
"""Kinds of device that bitsandbytes has kernels for."""


def check_quantization(bits: str, device: str) -> None:
    """Refuse quantised weights where they cannot be computed with.

    Args:
        bits: ``8bit`` or ``4bit``.
        device: Kind of device, as PyTorch names it.

    Raises:
        ConfigError: If bitsandbytes is missing, or has nothing for the device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"client.quantization={bits} needs bitsandbytes: pip install 'fedproxy[quantization]', or set it to none"
        )
    if device not in _DEVICES:
        raise ConfigError(
            f"client.quantization={bits} runs on {', '.join(_DEVICES)}, not on {device}; set it to none, or "
            "trainer.accelerator=cpu"
        )


def load_quantized(path: str | Path, bits: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a causal language model with the weights of its linear layers quantised, frozen and in evaluation mode.

    4 bits are NF4 with quantised scales (Dettmers et al. 2023, arXiv 2305.14314), 8 bits LLM.int8() (Dettmers et al.
    2022, arXiv 2208.07339). Embedding, norms and head keep ``dtype``, in which 4-bit layers also compute.

    Args:
        path: A ``from_pretrained`` folder.
        bits: ``8bit`` or ``4bit``.
        dtype: Of what is not quantised.
        device: Where the model is made, and stays.

    Raises:
        ConfigError: If this machine cannot do it.
        ModelError: If the model cannot be loaded so.
    """
    check_quantization(bits, device.type)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    model = load_weights(
        path,
        remedy=f"set client.quantization=none, {bits} does not work with this model",
        dtype=dtype,
        quantization_config=options,
        device_map={"": device},
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 a forward pass in evaluation mode packs 4-bit weights for a kernel without a backward
        # pass, which is then used in training too: gradients are wrong without a word (bitsandbytes 0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model

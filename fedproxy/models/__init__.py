"""What a decoder LLM is to FedProxy: its blocks, its checkpoint on disk and the map between proxy and target."""

from fedproxy.models.checkpoints import (
    check_model,
    check_tokenizer,
    load_model,
    load_tokenizer,
    save_model,
    state_sha256,
)
from fedproxy.models.decoder import Decoder
from fedproxy.models.layer_map import LayerMap
from fedproxy.models.streaming import placed

__all__ = [
    "Decoder",
    "LayerMap",
    "check_model",
    "check_tokenizer",
    "load_model",
    "load_tokenizer",
    "placed",
    "save_model",
    "state_sha256",
]

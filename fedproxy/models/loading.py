"""The one place where transformers reads a model, a configuration or a tokenizer.

All of them are foreign. Python that lies beside them is never run and nobody is asked whether it may be; weights are
read as safetensors or, where a folder has none, from a pickle by PyTorch's reader that builds tensors alone
(``weights_only``); a folder is read without the hub; and whatever goes wrong is one line.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedproxy.errors import FedProxyError, ModelError, first_line, one_line
from fedproxy.files import at_home
from fedproxy.model_hub import hub_or_its_cache, hub_says
from fedproxy.models.checkpoint_files import check_config_files, check_tokenizer_files, check_weight_files, weight_bytes
from fedproxy.models.quiet import without_reports

_GIVE = "give an asset, a from_pretrained folder or a hub id"
_DECODER = "give a decoder-only causal LM"
_ATTENTION = {"eager", "sdpa", "flex_attention"}
"""Attention that a configuration may choose. Of other names transformers may fetch compiled code from the hub."""
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
"""The keys of a configuration that name special tokens."""
_MEANT = {
    "backend tokenizer from one of": "there is neither a tokenizer.json nor what could be turned into one",
    "Weights only load failed": "its weights are a pickle that holds more than tensors, and such is never read",
}
"""Part of what transformers says -> what it means, where the first line does not say it or gives bad advice."""


def load_config(path: str | Path) -> Any:
    """Return a model's configuration.

    Args:
        path: A ``from_pretrained`` folder or a hub id.

    Raises:
        ModelError: If there is none, or it cannot be used.
    """
    folder = _folder(path)
    if folder is not None:
        check_config_files(folder)
    with _foreign(f"{path} is no model", _GIVE), _asking(folder):
        config = AutoConfig.from_pretrained(**_source(path, folder))
        if not {part for part in _attentions(config) if part} <= _ATTENTION:
            config._attn_implementation = None  # in all its parts: transformers chooses
        return config


def check_model(path: str | Path) -> Any:
    """Return the configuration of the decoder-only causal LM at ``path``; its weights are not read.

    Raises:
        ModelError: If there is none, its files are not whole, or its weights are quantised.
    """
    config = load_config(path)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{path} is an encoder-decoder model ({config.model_type}); {_DECODER}")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{path} is no causal LM (model type {config.model_type}); {_DECODER}")
    _refuse_quantised(path, config)
    folder = _folder(path)
    if folder is not None:
        check_weight_files(folder)
    return config


def load_weights(path: str | Path, *, remedy: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model, frozen and in evaluation mode.

    Args:
        path: A ``from_pretrained`` folder or a hub id.
        remedy: The end of the line where it fails for a reason of its own.
        options: Of ``from_pretrained``: dtype, quantization_config, device_map.

    Raises:
        ModelError: If it cannot be loaded whole.
    """
    config, folder = check_model(path), _folder(path)
    with _foreign(f"{path} cannot be loaded as a causal LM", remedy), _asking(folder):
        if folder is not None:
            _check_size(path, config, weight_bytes(folder))
        model, info = AutoModelForCausalLM.from_pretrained(
            **_source(path, folder),
            config=config,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    _check_generation(path, model.generation_config)
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise ModelError(
            f"{path}: {name} has the shape {tuple(found)}, and by config.json it must have {tuple(wanted)}; copy the "
            "model again"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: the checkpoint lacks {len(missing)} tensors, the first is {missing[0]}; copy the model again"
        )
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def load_gguf(file: Path) -> PreTrainedModel:
    """Load the model of a GGUF file, de-quantised to float32.

    Raises:
        ModelError: If it cannot be loaded.
    """
    with _foreign(f"{file} cannot be loaded", "fetch it again"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            **_source(file.parent, file.parent), gguf_file=file.name, dtype=torch.float32
        )
    return model


def load_tokenizer_files(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is.

    Args:
        path: A ``from_pretrained`` folder or a hub id.
        options: Of ``from_pretrained``.

    Raises:
        ModelError: If there is none at ``path``, or it cannot be read.
    """
    folder = _folder(path)
    remedy = "put the model's own tokenizer into its folder"
    if folder is not None:
        check_tokenizer_files(folder)
        if _needs_sentencepiece(folder):
            raise ModelError(
                f"{path} has a tokenizer.model and no tokenizer.json, and reading it needs sentencepiece; "
                "pip install sentencepiece protobuf, or put tokenizer.json into the folder"
            )
    with _foreign(f"{path} has no tokenizer that can be read", remedy), _asking(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_source(path, folder), **options)
        _try(tokenizer)
    tokenizer.init_kwargs["local_files_only"] = False  # how it was read is no part of what it is
    return tokenizer


def build(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return a causal language model of a configuration, with random weights or, on the meta device, with none.

    Raises:
        ModelError: If the family refuses the configuration.
    """
    with _foreign(f"a model of type {config.model_type} cannot be built", _DECODER):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def _folder(path: str | Path) -> Path | None:
    """Return the folder that ``path`` is, or None for a hub id.

    Raises:
        ModelError: If it can be neither.
    """
    local = at_home(path)
    if os.path.isdir(local):  # unlike Path's, false for what no path can be
        return local
    if os.path.exists(local):
        raise ModelError(f"{path} is a file; give the folder that it lies in")
    if str(path).startswith(("/", ".", "~")):
        raise ModelError(f"{path} is no folder; {_GIVE}")
    return None


def _source(path: str | Path, folder: Path | None) -> dict[str, Any]:
    """Return what every call of ``from_pretrained`` is given."""
    return {
        "pretrained_model_name_or_path": str(path if folder is None else folder),
        "local_files_only": folder is not None,
        "trust_remote_code": False,
    }


def _asking(folder: Path | None) -> AbstractContextManager[None]:
    """Return the context in which the hub may be asked: for what lies in a folder it never is."""
    return hub_or_its_cache() if folder is None else nullcontext()


def _check_size(path: str | Path, config: Any, held: int) -> None:
    """Refuse a configuration that asks for more weights than its files have bytes: memory for them would be filled."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in outline.parameters())
    if wanted > held:
        raise ModelError(
            f"{path}: config.json asks for {wanted} weights, and the files hold {held} bytes of them; copy the model "
            "again"
        )


def _check_generation(path: str | Path, config: Any) -> None:
    """Refuse ids of special tokens that are not numbers; transformers checks those of the model's configuration."""
    for name in SPECIAL:
        value = getattr(config, name, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and type(token) is not int:
                raise ModelError(
                    f"{path}: generation_config.json: {name} must be a whole number, a list of them or null, got "
                    f"{one_line(repr(value), 60)}; copy the model again"
                )


def _refuse_quantised(path: str | Path, config: Any) -> None:
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored:
            kind = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
            raise ModelError(
                f"{path} is quantised ({first_line(kind)}), and only plain weights can be cut, fused and scored; give "
                "the checkpoint that it was made from, in float32, bfloat16 or float16"
            )


def _attentions(config: Any) -> Iterator[str | None]:
    """Yield what attention a configuration and its parts ask for."""
    yield config._attn_implementation
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _attentions(part)


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer once: settings of a wrong type are taken as they are, and fail where text is encoded."""
    ids = tokenizer("a", padding=False, truncation=False)["input_ids"]
    tokenizer.decode([*ids, *tokenizer.all_special_ids])


def _needs_sentencepiece(folder: Path) -> bool:
    alone = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    return alone and find_spec("sentencepiece") is None


@contextmanager
def _foreign(what: str, remedy: str) -> Iterator[None]:
    """Run a library on what is foreign, silently; whatever it raises becomes one line."""
    try:
        with without_reports():
            yield
    except FedProxyError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what}: {_reason(error, remedy)}") from error


def _reason(error: BaseException, remedy: str) -> str:
    """Return why a library failed and the way out."""
    if (said := hub_says(error)) is not None:
        return f"{said}; {_GIVE}"
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, which is never run; give a model of a type that transformers knows"
    for said, meant in _MEANT.items():
        if said in str(error):
            return f"{meant}; {remedy}"
    if isinstance(error, (LookupError, AttributeError, TypeError)):
        return f"what its files say makes no sense ({type(error).__name__}: {first_line(error)}); {remedy}"
    return f"{first_line(error)}; {remedy}"

"""Models and tokenizers on disk: local folders or hub ids in, plain ``from_pretrained`` checkpoints out."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.errors import CheckpointError, ConfigError, ModelError
from fedproxy.files import whole_folder, write_text
from fedproxy.models.anonymity import strip_origin, with_template
from fedproxy.models.loading import SPECIAL, check_model, load_tokenizer_files, load_weights
from fedproxy.models.logit_offset import is_logit_offset, join_from, parts_of
from fedproxy.models.mapped import release
from fedproxy.models.quiet import without_bars, without_reports

__all__ = [
    "check_loadable",
    "check_model",
    "check_tokenizer",
    "load_model",
    "load_tokenizer",
    "save_model",
    "special_ids",
    "state_sha256",
    "without_bars",
    "without_reports",
]

_FILLED = 0.9
"""Least share of a model's vocabulary that its own tokenizer fills; padding to a round number takes a few per cent."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: str | Path, *, dtype: str = "float32") -> PreTrainedModel:
    """Load a causal language model, frozen and in evaluation mode.

    Args:
        path: A ``from_pretrained`` folder, one that fusion by logit_offset wrote, or a hub id.
        dtype: float32, bfloat16 or float16.

    Raises:
        ConfigError: If the dtype is unknown.
        ModelError: If there is no such model, it cannot be read, or it is not a decoder-only causal LM.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"target.dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if is_logit_offset(path):
        return join_from(path, lambda part: _load_plain(part, dtype))
    return _load_plain(path, dtype)


def _load_plain(path: str | Path, dtype: str) -> PreTrainedModel:
    return load_weights(path, remedy="copy the model again or choose another", dtype=_DTYPES[dtype])


def check_loadable(path: str | Path) -> Any:
    """Return the configuration of what :func:`load_model` loads, of three joined models the target's; weights stay.

    Raises:
        ModelError: As for :func:`load_model`, as far as it shows without weights.
    """
    places = parts_of(path)[1].values() if is_logit_offset(path) else [path]
    config, *_ = [check_model(place) for place in places]
    return config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end-of-text token.

    Raises:
        ModelError: If there is none at ``path``.
    """
    tokenizer = load_tokenizer_files(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str,
    anonymous: bool = False,
    template: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a plain checkpoint with tokenizer, generation config and model card, whole or not at all.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where it is to lie; an older one there is replaced.
        card: Text of ``README.md``.
        anonymous: Leave out all that could name the model's origin: paths, code, chat templates, unknown text.
        template: The one chat template of an anonymous checkpoint; None for none.
        max_shard_size: Largest file of weights, as transformers writes sizes; larger checkpoints are several files and
            an index.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    try:
        with whole_folder(folder) as part:
            with without_bars():
                model.save_pretrained(part, max_shard_size=max_shard_size)
            _save_tokenizer(with_template(tokenizer, template) if anonymous else tokenizer, part)
            if anonymous:
                strip_origin(part, model, tokenizer)
            write_text(part / "README.md", card)
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        raise CheckpointError(
            f"{folder} cannot be written: {error}; free disk space or choose another output_dir"
        ) from error


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # how the tokenizers library says that a file cannot be written
            raise OSError(str(error)) from error
        raise


def state_sha256(model: PreTrainedModel) -> str:
    """Return the hash of a model's weights: names, dtypes, shapes and bytes of its parameters in sorted order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        release()
    return digest.hexdigest()


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Check that a tokenizer can be the model's own.

    Every token has a place in the model's vocabulary, it leaves no more of that empty than padding to a round number
    does, and the model's special tokens are among its own.

    Raises:
        ModelError: If it cannot.
    """
    rows: int = model.get_input_embeddings().weight.shape[0]
    known = set(tokenizer.get_vocab().values())
    highest, remedy = max(known, default=-1), "put the model's own tokenizer into its folder"
    if highest >= rows:
        raise ModelError(
            f"{path}: the tokenizer has tokens up to id {highest}, the model's vocabulary {rows} entries; {remedy}"
        )
    if len(known) < _FILLED * rows:
        raise ModelError(
            f"{path}: the tokenizer has {len(known)} tokens, under {_FILLED:.0%} of the model's vocabulary of {rows}; "
            f"{remedy}"
        )
    for name, token in special_ids(model.config.get_text_config()):
        if token > highest:
            raise ModelError(
                f"{path}: the model's {name} is {token}, and the tokenizer's tokens end at id {highest}; {remedy}"
            )


def special_ids(config: Any) -> list[tuple[str, int]]:
    """Return the ids of padding, begin and end of text that a configuration names; a negative one is none."""
    found = []
    for name in SPECIAL:
        value = getattr(config, name, None)
        found += [(name, token) for token in (value if isinstance(value, list) else [value])]
    return [(name, token) for name, token in found if token is not None and token >= 0]

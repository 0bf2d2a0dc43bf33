"""A checkpoint for clients, freed of what tells which model it was cut from."""

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.files import write_text

_ORIGIN_KEYS = {
    *("_name_or_path", "name_or_path", "base_model", "auto_map", "chat_template", "transformers_version"),
    *("local_files_only", "id2label", "label2id", "problem_type", "task_specific_params"),
}
_MODEL_KEYS = {"model_type", "quantization_config", "per_layer_config"}
_TOKENIZER_KEYS = {
    *("tokenizer_class", "backend", "padding_side", "truncation_side", "model_input_names", "errors"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
}
_NEVER_ORIGIN = {"model_type", "architectures", "tokenizer_class", "added_tokens_decoder"}
"""Keys whose values are names of transformers' own classes, or tokens, which tokenizer.json holds as well."""
_LEAST_NAME = 6
_LEAST_WORD = 4
_COMMON = frozenset(
    {
        *("asset", "assistant", "base", "chat", "content", "data", "final", "helpful", "instruct", "large", "local"),
        *("main", "message", "messages", "mini", "model", "models", "preview", "role", "small", "system", "target"),
        *("test", "tiny", "tool", "tools", "user"),
    }
)
"""Words that a name may have and a chat template has for other reasons."""


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer that encodes alike and has one chat template, or none, and no further ones."""
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def named_in(text: str, *paths: str) -> str:
    """Return what of a text names a model that was loaded from one of ``paths``, or nothing.

    A name counts as a whole, however its parts are joined, and so does each of its words of four letters and more:
    "SmolLM" of SmolLM2-135M.
    """
    spelt = _spelt(text)
    for name in sorted(origin_names(*paths)):
        if name in spelt:
            return name
    words = {word for path in paths for word in re.findall(r"[a-z]+", path.lower().rsplit("/", 1)[-1])}
    plain = set(re.findall(r"[a-z]+", text.lower()))
    return min((word for word in words - _COMMON if len(word) >= _LEAST_WORD and word in plain), default="")


def strip_origin(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rewrite a saved checkpoint's configurations without anything that loading does not need and that has text.

    Unknown keys of numbers stay, since a model may read them; keys that hold text stay only where transformers defines
    them. What then still contains the target's name goes too. The vocabulary is left as it is.

    Args:
        folder: The checkpoint.
        model: What was saved there.
        tokenizer: Its tokenizer, which knows where it was loaded from.
    """
    names = origin_names(tokenizer.name_or_path, model.name_or_path)
    options = set(inspect.signature(type(tokenizer).__init__).parameters)
    for path in folder.glob("*config.json"):
        fields: dict[str, Any] = json.loads(path.read_text())
        if path.name == "config.json":
            fields = _defined(fields, model.config)
        elif path.name == "generation_config.json":
            fields = _known(fields, vars(GenerationConfig()))
        else:
            fields = _known(fields, {*_TOKENIZER_KEYS, *options, *(key for key in fields if key.endswith("_token"))})
        write_text(path, json.dumps(_without(fields, names), indent=2) + "\n")


def origin_names(*paths: str) -> set[str]:
    """Return the names, spelt as :func:`_spelt` does, by which text would give away where a model was loaded from.

    Short and plain words (``model``, ``llama``) are left out: configurations hold them for other reasons.
    """
    parts = {part for path in paths if path for part in (path, Path(path).resolve().name)}
    return {_spelt(part) for part in parts if len(part) >= _LEAST_NAME and not part.isalpha()}


def _spelt(text: str) -> str:
    """Return text in lower case and without what is written or left out at will between a name's parts."""
    return re.sub(r"[-_. ]", "", text.lower())


def _defined(fields: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Return a model's configuration as far as its class defines it, configurations inside it included."""
    known = {item.name for item in dataclasses.fields(config)} | set(config.attribute_map) | _MODEL_KEYS
    kept = _known(fields, known)
    inner = {key: getattr(config, key, None) for key, value in kept.items() if isinstance(value, dict)}
    return kept | {key: _defined(kept[key], part) for key, part in inner.items() if isinstance(part, PreTrainedConfig)}


def _known(fields: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the fields that are known, or hold no text."""
    names = set(known)
    return {key: value for key, value in fields.items() if key in names or isinstance(value, bool | int | float | None)}


def _without(fields: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return fields without keys that tell an origin and without those that contain one of ``names``, at any depth."""
    kept = {}
    for key, value in fields.items():
        if key in _ORIGIN_KEYS:
            continue
        if key in _NEVER_ORIGIN or key.endswith(("_token", "_tokens")):
            kept[key] = value
        elif isinstance(value, dict):
            kept[key] = _without(value, names)
        elif not any(name in _spelt(f"{key}: {json.dumps(value, ensure_ascii=False)}") for name in names):
            kept[key] = value
    return kept

"""Proxy-Tuning's model (Liu et al. 2024, arXiv 2401.08565): three causal language models whose logits are combined."""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedproxy.errors import ModelError, one_line
from fedproxy.files import at_home, read_json, write_json
from fedproxy.models.cache_name import CACHE

ROLES = ("target", "tuned", "untuned")
"""The three models, in the order in which they run."""
_LARGEST_ALPHA = torch.finfo(torch.float32).max
_REMEDY = "run fusion again"


class LogitOffsetConfig(PreTrainedConfig):  # type: ignore[misc]
    """Where the three models lie, and alpha.

    ``target``, ``tuned`` and ``untuned`` are folders, relative to the configuration's own or full paths, or hub ids.
    ``text_config`` is the target's, for whatever asks a model for its depth, width or vocabulary.
    """

    model_type = "logit_offset"
    alpha: float = 1.0
    target: str = ""
    tuned: str = ""
    untuned: str = ""
    text_config: Any = None


class LogitOffsetModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """logits = target + alpha (tuned - untuned), over the vocabulary entries that all three models have.

    Choice: where the vocabularies differ in length (families pad them differently), the target's further entries keep
    the target's logits, and entries that only the proxies have do not exist. The proxies read a token that only the
    target has as their entry 0. Each model keeps a cache of its own.
    """

    config_class = LogitOffsetConfig
    base_model_prefix = "target"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, target: PreTrainedModel, tuned: PreTrainedModel, untuned: PreTrainedModel, *, alpha: float = 1.0
    ) -> None:
        """Join three models; their weights are shared, not copied.

        Args:
            target: The server's LLM.
            tuned: The proxy after federated tuning.
            untuned: The same proxy before it.
            alpha: Strength of the offset.

        Raises:
            ModelError: If the two proxies have vocabularies of different length.
        """
        super().__init__(_config(target, alpha))
        words = [model.get_output_embeddings().weight.shape[0] for model in (tuned, untuned)]
        if words[0] != words[1]:
            raise ModelError(
                f"logit_offset: the tuned proxy has {words[0]} vocabulary entries, the untuned one {words[1]}; "
                "give one proxy before and after tuning"
            )
        self.target, self.tuned, self.untuned, self.alpha = target, tuned, untuned, alpha
        self._words = words[0]
        self.generation_config = copy.deepcopy(target.generation_config)
        self.eval()

    @property
    def models(self) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
        """Target, tuned proxy and untuned proxy."""
        return self.target, self.tuned, self.untuned

    def output_heads(self) -> list[nn.Module]:
        """Return the three vocabulary heads."""
        return [model.get_output_embeddings() for model in self.models]

    def get_input_embeddings(self) -> nn.Module:
        """Return the target's embedding."""
        embedding: nn.Module = self.target.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the target's vocabulary head."""
        head: nn.Module = self.target.get_output_embeddings()
        return head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the three models on the same tokens.

        Args:
            input_ids: int64 (batch, tokens).
            attention_mask: (batch, seen tokens), or a mask that the models take as it is.
            position_ids: int64 (batch, tokens).
            past_key_values: What an earlier call returned; an empty cache of another kind is replaced.
            use_cache: Return the caches for the next call.
            logits_to_keep: Only the logits of the last so many tokens; 0 is all.
            cache: What transformers calls ``past_key_values`` from 5.24 on.
            kwargs: Passed on to all three.

        Returns:
            ``logits`` (batch, tokens, the target's vocabulary) in the target's dtype, and the caches.

        Raises:
            ModelError: If a filled cache comes from another model.
        """
        caches = self._caches(past_key_values if cache is None else cache, use_cache)
        known = input_ids.masked_fill(input_ids >= self._words, 0)
        found = []
        for index, model in enumerate(self.models):
            output = model(
                input_ids=input_ids if model is self.target else known,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=caches is not None,
                logits_to_keep=logits_to_keep,
                **{CACHE: None if caches is None else caches.views[index]},
                **kwargs,
            )
            found.append(output.logits)
        return CausalLMOutputWithPast(logits=offset_logits(*found, alpha=self.alpha), **{CACHE: caches})

    def _caches(self, given: Cache | None, use_cache: bool | None) -> "ThreeCaches | None":
        if use_cache is False or isinstance(given, ThreeCaches):
            return given if isinstance(given, ThreeCaches) else None
        if given is None and use_cache is None:
            return None
        if given is not None and given.get_seq_length() > 0:
            raise ModelError(f"logit_offset: {CACHE} holds another model's tokens; pass what forward returned")
        return ThreeCaches(self.models)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the wrapper's configuration; a model that lies in no folder or hub yet is written into a subfolder.

        Folders beside it or one level up, those of one run, are noted relative to ``save_directory``, so that the run
        can be moved as a whole; any other by its full path. Other options are those of a model that is written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        places = {role: _place(model, role, folder, kwargs) for role, model in zip(ROLES, self.models, strict=True)}
        content = {"model_type": LogitOffsetConfig.model_type, "alpha": self.alpha, **places}
        write_json(folder / "config.json", content)
        self.generation_config.save_pretrained(folder)


class ThreeCaches(Cache):  # type: ignore[misc]
    """The layers of three caches as one, so that reordering or cropping it does so for all three models.

    Args:
        models: The models that each fill one of them.
    """

    def __init__(self, models: tuple[PreTrainedModel, ...]) -> None:
        self.views = [DynamicCache(config=model.config) for model in models]
        super().__init__(layers=[layer for view in self.views for layer in view.layers])


def offset_logits(target: Tensor, tuned: Tensor, untuned: Tensor, *, alpha: float) -> Tensor:
    """Return target + alpha (tuned - untuned) over the entries all have, the target's logits beyond, in its dtype.

    Args:
        target: (..., V).
        tuned: (..., W); V and W may differ by padding at the end.
        untuned: (..., W).
        alpha: Strength.
    """
    shared = min(target.shape[-1], tuned.shape[-1])
    result = target.clone()
    change = tuned[..., :shared].float() - untuned[..., :shared].float()
    result[..., :shared] = target[..., :shared].float().add(change.to(target.device), alpha=alpha)
    return result


def is_logit_offset(folder: str | Path) -> bool:
    """Return whether a folder holds a wrapper's configuration."""
    try:
        content = _read(at_home(folder) / "config.json")
    except ModelError:
        return False
    return content.get("model_type") == LogitOffsetConfig.model_type


def join_from(folder: str | Path, load: Callable[[str], PreTrainedModel]) -> LogitOffsetModel:
    """Load the three models that a wrapper's configuration names, and join them.

    Args:
        folder: Where :meth:`LogitOffsetModel.save_pretrained` wrote.
        load: Loads one model from a folder or a hub id; never a wrapper again.

    Raises:
        ModelError: If the configuration is broken, or a folder that it names is gone.
    """
    alpha, places = parts_of(folder)
    return LogitOffsetModel(**{role: load(place) for role, place in places.items()}, alpha=alpha)


def parts_of(folder: str | Path) -> tuple[float, dict[str, str]]:
    """Return alpha and, by role, the folder or hub id of each model that a wrapper's configuration names.

    Raises:
        ModelError: As for :func:`join_from`.
    """
    path = at_home(folder) / "config.json"
    content = _read(path)
    alpha, places = content.get("alpha"), {role: content.get(role) for role in ROLES}
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:
        raise ModelError(f"{path}: alpha must be a finite number in float32, got {one_line(alpha)}; {_REMEDY}")
    found = {}
    for role, place in places.items():
        if not isinstance(place, str) or not place:
            raise ModelError(f"{path}: {role} must name a folder or a hub id; {_REMEDY}")
        local = path.parent / place
        if place.startswith((".", "/")) and not os.path.isdir(local):
            raise ModelError(f"{path}: the {role} model is not in {place}; put it back, or correct the key {role!r}")
        found[role] = str(local.resolve()) if os.path.isdir(local) else place
    return alpha, found


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, dict, error=ModelError, remedy=_REMEDY)


def require_same_vocabulary(target: Mapping[str, int], proxy: Mapping[str, int]) -> None:
    """Refuse two vocabularies (token to id) whose logits cannot be added; one may have further tokens at its end.

    Raises:
        ModelError: Naming the first token that differs.
    """
    few, many = sorted((target, proxy), key=len)
    for token in sorted(few, key=few.__getitem__):
        if many.get(token) != few[token]:
            raise ModelError(
                f"logit_offset: target and proxy have different vocabularies (token {token!r} is {target.get(token)} "
                f"in one and {proxy.get(token)} in the other); use fusion.name=plug_in, or a proxy of the same family"
            )


def _config(target: PreTrainedModel, alpha: float) -> LogitOffsetConfig:
    text = target.config.get_text_config()
    tokens = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LogitOffsetConfig(alpha=alpha, text_config=text, vocab_size=text.vocab_size, **tokens)


def _place(model: PreTrainedModel, role: str, folder: Path, options: Mapping[str, Any]) -> str:
    origin: str = model.name_or_path
    if origin in ("", "None"):  # what transformers notes for a model that was built in memory
        model.save_pretrained(folder / role, **options)
        return f"./{role}"
    if not Path(origin).is_dir():
        return origin
    if not Path(origin).resolve().is_relative_to(folder.resolve().parent.parent):
        return str(Path(origin).resolve())
    relative = os.path.relpath(origin, folder)
    return relative if relative.startswith(".") else f"./{relative}"


# transformers' own loaders look at the configuration of a folder before they read its tokenizer.
AutoConfig.register(LogitOffsetConfig.model_type, LogitOffsetConfig)

"""Distillation of the target into the proxy on public text, before any client sees the proxy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedproxy.data.batching import ShuffledBatches
from fedproxy.errors import ModelError
from fedproxy.models import Decoder, LayerMap, placed
from fedproxy.models.decoder import set_weights
from fedproxy.models.streaming import released_by_block
from fedproxy.modules.distillation import DistillationModule, check_pair, check_tokens, require_float32
from fedproxy.modules.distillation_config import DistillationConfig
from fedproxy.modules.teacher import Teacher
from fedproxy.modules.teacher_cache import TeacherCache
from fedproxy.modules.trainer import fit, make_trainer
from fedproxy.strategies.trainable.base import TrainableModel
from fedproxy.strategies.trainable.lora import Lora
from fedproxy.strategies.trainable.lora_places import ALL_LINEAR

_MAX_NORM = 1.0


def distil(
    proxy: PreTrainedModel,
    target: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    settings: DistillationConfig,
    layer_map: LayerMap,
    trainer: Mapping[str, Any],
    generator: torch.Generator,
    cache: Path | None = None,
    logs: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Distil the target into the proxy, in place.

    Choice: the embedding, the final norm and the head stay as they are, since the plug-in keeps the target's own.

    Args:
        proxy: The student.
        target: The teacher; left as it is but frozen. On the trainer's device for the length of the training, as a
            whole or, where it has no room there, one block at a time.
        batches: ``input_ids`` and ``attention_mask`` of public text, int64 (batch, length), padded on the right; gone
            over in a new order per epoch until the steps are done.
        settings: Steps, learning rate, losses; at least one step.
        layer_map: The map that the proxy was compressed with.
        trainer: Options of lightning.Trainer.
        generator: CPU generator of LoRA's start, the order and dropout.
        cache: Folder of the teacher's outputs, where ``settings.cache_teacher`` asks for one.
        logs: Folder of what Lightning's loggers and profilers write.
        advance: Told after each batch how many steps are done, out of how many.

    Returns:
        Mean loss of the last ten steps.

    Raises:
        ConfigError: If ``top_k`` is more than the vocabulary.
        ModelError: If the two models do not fit each other, or the proxy's weights end as NaN or infinity.
        CheckpointError: If the cache cannot be written.
    """
    check_pair(proxy, target, layer_map.proxy_to_target)
    check_tokens(proxy, batches)
    if settings.train == "full":
        require_float32(proxy, "distillation.train=full", "distillation.train=lora")
    target.requires_grad_(False).eval()
    pairs = tuple(enumerate(layer_map.counterparts(len(Decoder.of(target))))) if settings.hidden_weight else ()
    adapter = _lora(proxy, settings, generator) if settings.train == "lora" else None
    tuned = list(adapter.parameters().values()) if adapter else _block_weights(proxy)
    seed = int(torch.randint(2**62, (), generator=generator))
    runner = make_trainer(
        trainer, max_epochs=-1, max_steps=settings.steps, max_grad_norm=_MAX_NORM, callbacks=[_Told(advance)], root=logs
    )
    with placed(target, runner.strategy.root_device), released_by_block(target):
        module = _module(proxy, target, tuned, pairs, settings, _cache(cache, settings, layer_map))
        proxy.train()
        fit(runner, module, ShuffledBatches(batches, generator), seed=seed)
    if adapter is not None:
        merged = {name: weight.to(proxy.dtype) for name, weight in adapter.merged_weights().items()}
        set_weights(adapter.detach(), merged)
    _require_finite(proxy.eval().requires_grad_(False), settings)
    return module.last_loss


def _require_finite(proxy: PreTrainedModel, settings: DistillationConfig) -> None:
    broken = next((name for name, weight in proxy.named_parameters() if not bool(weight.isfinite().all())), None)
    if broken is not None:
        raise ModelError(
            f"distillation.lr={settings.lr:g}: after {settings.steps} steps {broken} holds NaN or infinity, and no "
            "proxy is kept; lower it, in another output_dir or with overwrite=true"
        )


class _Told(Callback):  # type: ignore[misc]
    """Tells how many steps are done after each batch."""

    def __init__(self, advance: Callable[[int, int], None]) -> None:
        self._advance = advance

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Tell it."""
        self._advance(trainer.global_step, trainer.max_steps)


def _cache(folder: Path | None, settings: DistillationConfig, layer_map: LayerMap) -> TeacherCache | None:
    if folder is None or not settings.cache_teacher:
        return None
    most = settings.cache_gib * 2**30
    return TeacherCache(folder, target_sha256=layer_map.target_sha256, top_k=settings.top_k, max_bytes=most)


def _module(
    proxy: PreTrainedModel,
    target: PreTrainedModel,
    tuned: Sequence[nn.Parameter],
    pairs: Sequence[tuple[int, int]],
    settings: DistillationConfig,
    kept: TeacherCache | None,
) -> DistillationModule:
    teacher = Teacher(
        target,
        sorted({other for _, other in pairs}),
        temperature=settings.temperature,
        distributions=settings.kl_weight > 0,
        cache=kept,
    )
    return DistillationModule(
        proxy,
        teacher,
        tuned,
        lr=settings.lr,
        pairs=pairs,
        divergence=settings.divergence,
        temperature=settings.temperature,
        kl_weight=settings.kl_weight,
        hidden_weight=settings.hidden_weight,
    )


def _block_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    model.requires_grad_(False)
    return list(Decoder.of(model).blocks.requires_grad_(True).parameters())


def _lora(proxy: PreTrainedModel, settings: DistillationConfig, generator: torch.Generator) -> TrainableModel:
    """Attach LoRA to every linear layer of the blocks."""
    lora = Lora(r=settings.lora_r, alpha=settings.lora_alpha, modules=(ALL_LINEAR,))
    return lora.attach(proxy, generator)

"""Healing by ridge regression: the block before each gap takes over what the removed blocks did, without training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ConfigError, DataError, ModelError
from fedproxy.models.decoder import Decoder, hidden_state
from fedproxy.models.feed_forward import FeedForward
from fedproxy.models.layer_map import LayerMap
from fedproxy.models.mapped import release
from fedproxy.models.streaming import released_by_block

NEEDS_GAPS = "healing.rows needs a compressor that removes whole blocks; leave it out, or choose another"
_INSTEAD = "leave healing out and distil instead (distillation.steps)"


@dataclass(frozen=True)
class HealingConfig:
    """Ridge regression of the target's hidden states behind every gap, after compression, before distillation."""

    rows: int = 0
    """Rows of compression.calibration.path to fit on, of many times as many tokens as a block has neurons; 0 skips
    healing."""
    ridge: float = 0.01
    """Penalty on the change of the weights, in units of the mean squared activation."""

    def __post_init__(self) -> None:
        """Check the ranges, and that ``ridge`` is set only where blocks are healed; else a ConfigError."""
        if self.rows < 0:
            raise ConfigError(f"healing.rows must be at least 0, got {self.rows}")
        if not self.ridge > 0:
            raise ConfigError(f"healing.ridge must be positive, got {self.ridge}")
        if self.rows == 0 and self.ridge != HealingConfig.ridge:
            raise ConfigError(
                "healing.rows must be at least 1 where healing.ridge is set, got 0; set it, or leave both out"
            )


@dataclass(frozen=True)
class HealedGap:
    """One gap and how well it was closed."""

    block: int
    """Proxy block before the gap, whose feed-forward layer was fitted."""
    removed: int
    """Target blocks that the gap stands for."""
    before: float
    """Mean over fitted tokens of ||h - h*||^2 / ||h||^2: h the target's hidden state behind the gap, h* the proxy's."""
    after: float
    """The same with the fitted weights."""


def gaps(layer_map: LayerMap, depth: int) -> tuple[tuple[int, int], ...]:
    """Return (proxy block, target block) for every gap: after healing the first gives what the second does.

    Blocks removed before the first kept one have none before them, and are no gap.

    Args:
        layer_map: A map of whole blocks, none of them repeated.
        depth: Blocks of the target.

    Raises:
        ConfigError: If blocks are shared or narrowed: nothing was removed that a block could stand in for.
    """
    kept = layer_map.proxy_to_target
    if layer_map.neurons is not None or any(left >= right for left, right in pairwise(kept)):
        raise ConfigError(NEEDS_GAPS)
    followers = (*kept[1:], depth)
    return tuple((own, end - 1) for own, (old, end) in enumerate(zip(kept, followers, strict=True)) if end - 1 > old)


@torch.no_grad()
def heal(
    proxy: PreTrainedModel,
    target: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    layer_map: LayerMap,
    ridge: float,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[HealedGap, ...]:
    """Let the block before every gap do the removed blocks' work, in place.

    With z what enters the projection W out of the feed-forward layer of the block before a gap, h* the block's output
    and h the target's hidden state behind the gap, W becomes W + D, D minimising

        sum over real tokens of ||h - h* - D z||^2 / RMS(h)^2  +  ridge * mean(z^2 / RMS(h)^2) * tokens * ||D||^2,

    in closed form: the loss of hidden states of :func:`fedproxy.modules.losses.hidden_distance`, with a ridge. Gaps are
    closed from the first to the last, so that later fits see what the healed proxy computes. No parameter is added and
    no other weight changes.

    After ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819), which puts a linear map of the hidden size behind the
    feed-forward layer. Choice: the projection itself is fitted, which has a column per neuron instead of one per hidden
    unit, around its old value, and on the proxy's own states.

    Memory: the target's hidden states behind every gap for all tokens, in float32 on the CPU, and a float64 matrix of
    neurons squared.

    Args:
        proxy: The compressed model, in evaluation mode.
        target: The model that it was compressed from; runs where it is.
        batches: ``input_ids`` and ``attention_mask`` of public text, int64 (batch, length), padded on the right.
        layer_map: The map that the proxy was compressed with.
        ridge: Penalty on D, > 0, relative to the mean squared activation.
        advance: Told after each batch how many passes over batches are done, out of how many.

    Returns:
        One entry per gap, in their order.

    Raises:
        ConfigError: If blocks were shared or narrowed instead of removed.
        DataError: If the text holds no token.
        ModelError: If a block has no single feed-forward layer, or what it gives is not added to the residual stream as
            it is, or states are not finite.
    """
    decoder = Decoder.of(proxy)
    found = gaps(layer_map, len(Decoder.of(target)))
    if not found:
        return ()
    if not any(bool(batch["attention_mask"].any()) for batch in batches):
        raise DataError("healing.rows: the text holds no token; give rows with text")
    step = partial(_step, advance, count(1), len(batches) * (1 + len(found)))
    with released_by_block(target):
        wanted = _states_behind(target, batches, [behind for _, behind in found], step)
    release()  # the target has said all
    healed = []
    for own, behind in found:
        before, after = _heal_gap(decoder, own, batches, wanted.pop(behind), _Fit(ridge, step))
        healed.append(HealedGap(own, behind - layer_map.proxy_to_target[own], before, after))
    return tuple(healed)


def _step(advance: Callable[[int, int], None], done: Iterator[int], total: int) -> None:
    advance(next(done), total)


def _states_behind(
    target: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    blocks: Sequence[int],
    step: Callable[[], object],
) -> dict[int, list[Tensor]]:
    """Return the target's hidden states behind blocks, one tensor per batch, float32 (tokens, hidden)."""
    from fedproxy.modules.teacher import observe

    wanted: dict[int, list[Tensor]] = {block: [] for block in blocks}
    for batch in batches:
        seen = observe(target, _on(batch, target.device), list(wanted))
        for block, kept in wanted.items():
            kept.append(seen[f"block_{block}"].float().cpu())
        step()
    return wanted


def _heal_gap(
    decoder: Decoder, own: int, batches: Sequence[Mapping[str, Tensor]], wanted: Sequence[Tensor], fit: "_Fit"
) -> tuple[float, float]:
    """Fit the block before one gap, in place, and return the error before and after."""
    device = decoder.model.device
    block = decoder.blocks[own]
    layer = _out_projection(block, decoder)
    with _stopping_at(block, layer) as run:
        for batch, states in zip(batches, wanted, strict=True):
            entered, given = run(decoder, _on(batch, device))
            fit.add(entered, given, states.to(given.device))
        before, after, change = fit.solve()
        probe = _on(batches[0], device)
        entered, given = run(decoder, probe)
        layer.get_parameter("weight").add_(change if isinstance(layer, Conv1D) else change.T)
        _, moved = run(decoder, probe)
    _check_additive(block, given, moved, entered @ change)
    return before, after


class _Fit:
    """Sums of one ridge regression, over tokens that each count 1 / RMS(h)^2."""

    def __init__(self, ridge: float, step: Callable[[], object]) -> None:
        self.ridge, self.step, self.tokens, self.error = ridge, step, 0, 0.0
        self.device = torch.device("cpu")
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, entered: Tensor, given: Tensor, wanted: Tensor) -> None:
        """Add a batch: z (tokens, neurons), h* and h (tokens, hidden), all float32."""
        scale = _inverse_rms(wanted)
        inputs, missing = entered * scale, (wanted - given) * scale
        gram, cross = (inputs.T @ inputs).cpu().double(), (inputs.T @ missing).cpu().double()
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.cross = cross if self.cross is None else self.cross.add_(cross)
        self.device = entered.device
        self.error += float(missing.square().mean(dim=-1).sum())
        self.tokens += len(wanted)
        self.step()

    def solve(self) -> tuple[float, float, Tensor]:
        """Return the mean error without and with the change, and the change D^T, float32 (neurons, hidden)."""
        assert self.gram is not None
        assert self.cross is not None
        if not bool(self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise ModelError("healing: hidden states are not finite; load the target in another target.dtype")
        level = self.ridge * self.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        self.gram.diagonal().add_(level)
        change = torch.cholesky_solve(self.cross, torch.linalg.cholesky(self.gram))
        gained = (change * self.cross).sum() + level * change.square().sum()
        before = self.error / self.tokens
        return before, before - float(gained) / self.cross.shape[1] / self.tokens, change.float().to(self.device)


class _StopForward(Exception):  # noqa: N818 (no error)
    """Ends a forward pass behind the block that is looked at."""


@contextmanager
def _stopping_at(block: nn.Module, layer: nn.Module) -> Iterator["_Run"]:
    """Let forward passes end behind ``block``; what entered ``layer`` and what the block gave is returned."""
    seen: dict[str, Tensor] = {}

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["entered"] = inputs[0]

    def leave(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen["given"] = hidden_state(output)
        raise _StopForward

    handles = [layer.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield _Run(seen)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Run:
    seen: dict[str, Tensor]

    def __call__(self, decoder: Decoder, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return, for real tokens, what entered the layer (tokens, neurons) and the block's output (tokens, hidden)."""
        with suppress(_StopForward):
            # No real token of a causal model sees padding on the right, so no mask is needed.
            decoder.body(input_ids=batch["input_ids"], use_cache=False)
        real = batch["attention_mask"].bool()
        entered = self.seen["entered"]
        entered = entered.reshape(real.numel(), -1)[real.flatten()]  # OPT hands over (batch * tokens, neurons)
        return entered.float(), self.seen["given"][real].float()


def _out_projection(block: nn.Module, decoder: Decoder) -> nn.Module:
    hidden = decoder.model.config.get_text_config().hidden_size  # an embedding may be narrower (OPT's)
    try:
        return block.get_submodule(FeedForward.of(block, hidden).out_projection)
    except ModelError:
        raise ModelError(
            f"healing.rows: {type(block).__name__} has no single feed-forward layer to fit; {_INSTEAD}"
        ) from None


def _check_additive(block: nn.Module, before: Tensor, after: Tensor, fitted: Tensor) -> None:
    """Check that a block's output (tokens, hidden) moved by what was fitted.

    Raises:
        ModelError: If something, a norm in Gemma 2 and 3, lies between the layer and the residual stream.
    """
    scale = _inverse_rms(before)
    gap, moved, all_of_it = ((part * scale).norm() for part in (after - before - fitted, fitted, before))
    if not gap <= 0.1 * moved + 1e-3 * all_of_it:  # half precision rounds the weights; a norm changes all of it
        raise ModelError(
            f"healing.rows: {type(block).__name__} does not add its feed-forward output to the residual stream as it "
            f"is; {_INSTEAD}"
        )


def _inverse_rms(states: Tensor) -> Tensor:
    """Return 1 / RMS of every token's state, (tokens, 1), from float32 (tokens, hidden)."""
    return states.square().mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()


def _on(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}

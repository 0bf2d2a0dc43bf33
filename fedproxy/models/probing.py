"""A model on a few tokens: that it is causal, generates with its cache, and is what compression says it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fedproxy.errors import ConfigError, FedProxyError, ModelError, first_line
from fedproxy.models.checkpoints import special_ids, without_reports
from fedproxy.models.decoder import Decoder, positions_limit
from fedproxy.models.mapped import release
from fedproxy.models.modes import evaluating
from fedproxy.models.skipping import skipping
from fedproxy.models.streaming import released_by_block

_ROWS, _TOKENS = 5, 8
_GENERATED = 2  # the first comes from the prompt's own pass, the second from one step with the cache
_WINDOWS, _SHORT = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"), 3
"""Configuration fields from which masks are made in every pass, and the window of a check, in tokens."""
_SAME_WORK, _OTHER_WORK = (2e-5, 5e-2), (1e-3, 1e-1)
"""Largest difference of logits as a share of the largest logit, in float32 and in half precision: where the same
operations run in the same shapes, and where they run in other shapes."""


def check_target(model: PreTrainedModel) -> None:
    """Check that a target has one stack of blocks and, on a few tokens, that it is causal and its cache works.

    Raises:
        ModelError: If it is not, or if it fails to run.
    """
    Decoder.of(model)
    check_decoder(model, remedy="give another target.path, a decoder-only causal LM")


def check_decoder(model: PreTrainedModel, *, remedy: str) -> None:
    """Check on a few tokens that a model is causal, and that generation with its cache is generation without.

    Args:
        model: The model, in evaluation mode.
        remedy: What to do where it is not; the end of the error's line.

    Raises:
        ModelError: If it is not, or if it fails to run.
    """
    kind, ids = type(model).__name__, _probe(model)
    if not check_causal(model, remedy=remedy):
        raise ModelError(f"{kind}: its logits are not numbers; load it in another target.dtype or copy it again")
    with _running(kind, remedy):
        options = GenerationConfig(
            max_new_tokens=_GENERATED,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            suppress_tokens=sorted(_special(model)) or None,  # an early end would leave out the cached step
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
        )
        with evaluating(model), _own_generation_config_aside(model):
            said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        expected = _logits(model, said.sequences[:, :-1])[:, -_GENERATED:]
        gap = _gap(torch.stack(said.logits, dim=1).float(), expected)
        if not gap <= _allowed(model, _OTHER_WORK):
            raise ModelError(f"{kind} generates otherwise with its cache: logits differ by {gap:.2g}; {remedy}")


def check_causal(model: PreTrainedModel, *, remedy: str) -> bool:
    """Check on a few tokens that what a model says of them does not change with later ones.

    A masked language model (BERT) loads as a causal one, and sees the answer that it is asked for.

    Args:
        model: The model, in evaluation mode.
        remedy: What to do where it is not; the end of the error's line.

    Returns:
        False where that cannot be told, since its logits are not numbers.

    Raises:
        ModelError: If they change, or if the model fails to run.
    """
    kind, ids = type(model).__name__, _probe(model)
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, :half], ids.roll(1, dims=0)[:, half:]], dim=1)
    with _running(kind, remedy):
        first, second = _logits(model, torch.cat([ids, other])).chunk(2)
        if bool(first.isnan().any()):
            return False
        gap = _gap(first[:, :half], second[:, :half])
    if not gap <= _allowed(model, _SAME_WORK):
        raise ModelError(f"{kind} is not causal: logits change by {gap:.2g} with later tokens; {remedy}")
    return True


@contextmanager
def _own_generation_config_aside(model: PreTrainedModel) -> Iterator[None]:
    """Keep what a model asks of generation (stop strings, penalties) out of the options, which it would fill in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def check_packing(model: PreTrainedModel) -> None:
    """Check on a few tokens that rows side by side in one sequence, told apart by positions, are as each alone.

    Recurrent layers carry a state over, and some families take a token's place from the sequence. A window shorter than
    the rows is part of the check where a family has one.

    Args:
        model: The model, in evaluation mode.

    Raises:
        ConfigError: If it computes otherwise, or takes no positions.
    """
    kind, (first, second, *_) = type(model).__name__, _probe(model)
    parts, remedy = (first[:-2], second), "set client.packing=false"
    alone = [_logits_alone(model, part, kind, remedy) for part in parts]
    places = torch.cat([torch.arange(len(part), device=model.device) for part in parts])
    try:
        with _running(kind, remedy), _short_windows(model):
            ids = torch.cat(parts)[None]
            both = model(input_ids=ids, attention_mask=None, position_ids=places[None], use_cache=False).logits.float()
    except ModelError as error:
        raise ConfigError(f"client.packing: {error}") from error
    gap = max(_gap(*pair) for pair in zip(both.split([len(p) for p in parts], dim=1), alone, strict=True))
    if not gap <= _allowed(model, _OTHER_WORK):
        raise ConfigError(
            f"client.packing: {kind} does not keep rows apart that share a sequence (logits differ by {gap:.2g}); "
            f"{remedy}"
        )


def _logits_alone(model: PreTrainedModel, ids: Tensor, kind: str, remedy: str) -> Tensor:
    with _running(kind, remedy), _short_windows(model):
        return _logits(model, ids[None])


def check_subset(decoder: Decoder, proxy: PreTrainedModel, kept: Sequence[int]) -> None:
    """Check on a few tokens that a model of the blocks ``kept`` computes what the whole one does without the others.

    Families in which a block's work depends on its position in a way that its configuration does not say would
    otherwise give a silently broken proxy. Of blocks that are there more than once, a copy outside the block's own
    place is compared, the others passed over.

    Args:
        decoder: The whole model.
        proxy: The model of some of its blocks.
        kept: The whole model's block behind each of the proxy's, ascending; one may be repeated.

    Raises:
        ModelError: If the two differ, or one fails to run.
    """
    place = {block: new for new, block in enumerate(kept)}
    place |= {block: new for new, block in enumerate(kept) if new != block}
    kind, remedy = type(decoder.model).__name__, "choose compression.name=none"
    ids, shallow = _probe(decoder.model), Decoder.of(proxy)
    for new, old in enumerate(kept):
        _check_buffers(kind, shallow.blocks[new], decoder.blocks[old], old, remedy)
    release()
    with (
        _running(kind, remedy),
        _short_windows(decoder.model),
        _short_windows(proxy),
        released_by_block(decoder.model),
    ):
        with skipping(decoder, sorted(set(range(len(decoder))) - set(kept))):
            expected = _logits(decoder.model, ids)
        with skipping(shallow, sorted(set(range(len(shallow))) - set(place.values()))):
            gap = _gap(_logits(proxy, ids), expected)
    if not gap <= _allowed(decoder.model, _SAME_WORK):
        raise ModelError(
            f"{kind}: its blocks work differently in another place (logits differ by {gap:.2g}), so that blocks "
            f"cannot be removed; {remedy}"
        )


def _check_buffers(kind: str, own: nn.Module, block: nn.Module, index: int, remedy: str) -> None:
    """Check that what a block computed when it was built (masks, slopes), and did not read, is what the target's has.

    Raises:
        ModelError: If it is not.
    """
    wanted = dict(block.named_buffers())
    for name, buffer in own.named_buffers():
        if not torch.equal(buffer, wanted[name].to(buffer.device)):
            raise ModelError(f"{kind}: {name} of block {index} depends on its place; {remedy}")


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Let attention look back over fewer tokens than the probe has, so that a wrong kind of block shows."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    configs |= {id(text): text for text in [config.get_text_config() for config in configs.values()]}
    own = [
        (vars(config), name, vars(config)[name])
        for config in configs.values()
        for name in _WINDOWS
        if isinstance(vars(config).get(name), int) and vars(config)[name] > _SHORT
    ]
    for fields, name, _ in own:
        fields[name] = _SHORT
    try:
        yield
    finally:
        for fields, name, value in own:
            fields[name] = value


def _special(model: PreTrainedModel) -> set[int]:
    """Return the ids of padding, begin and end of text, which some families treat in a way of their own."""
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    return {token for config in configs for _, token in special_ids(config)}


def _probe(model: PreTrainedModel) -> Tensor:
    """Return token ids, int64 (rows, tokens), short enough for the model's positions."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    special = _special(model)
    plain = [token for token in range(min(rows, 1024)) if token not in special] or list(range(rows))
    tokens = max(2, min(_TOKENS, positions_limit(model, _TOKENS + _GENERATED) - _GENERATED))
    ids = [plain[index % len(plain)] for index in range(_ROWS * tokens)]
    return torch.tensor(ids, device=model.device).reshape(_ROWS, tokens)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()


def _gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest logit, in the row in the middle.

    One row may differ for once: rounding can send a token to another expert of a mixture.

    Args:
        found: (rows, tokens, vocabulary).
        expected: Of the same shape.
    """
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().clamp_min(1e-6) if finite.numel() else expected.new_ones(())
    apart = (found - expected).abs().masked_fill(found == expected, 0.0)  # a masked entry is -inf in both
    return float(apart.flatten(1).amax(dim=1).median() / largest)  # not a number is no agreement


def _allowed(model: PreTrainedModel, shares: tuple[float, float]) -> float:
    return shares[0] if model.dtype == torch.float32 else shares[1]


@contextmanager
def _running(kind: str, remedy: str) -> Iterator[None]:
    """Run a model without its family's notices, and turn whatever goes wrong in there into one line."""
    try:
        with torch.no_grad(), without_reports():
            yield
    except (FedProxyError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # code of any family runs here
        raise ModelError(f"{kind} fails on a few tokens: {first_line(error)}; {remedy}") from error

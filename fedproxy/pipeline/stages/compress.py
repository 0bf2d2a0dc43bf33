"""Stage (i): from the target to a proxy."""

import dataclasses
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fedproxy.config import RunConfig
from fedproxy.data.assets import cache_root
from fedproxy.models import Decoder, LayerMap, placed, save_model
from fedproxy.models.decoder import disclosed_count, parameter_count, positions_limit
from fedproxy.models.mapped import release
from fedproxy.models.probing import check_packing, check_target
from fedproxy.modules.devices import one_device
from fedproxy.modules.fidelity import compare
from fedproxy.pipeline.context import LAYER_MAP, UNDISTILLED, Run
from fedproxy.pipeline.data import held_out_texts, public_texts, rows_read, text_batches, texts_read
from fedproxy.pipeline.display import Bar
from fedproxy.pipeline.reads import COMPRESS, FIDELITY
from fedproxy.pipeline.stage import Stage
from fedproxy.reporting import CompressionReport, model_card
from fedproxy.reporting.block_plot import write_influence_plot
from fedproxy.seeding import generator
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.compression.block_influence import block_influence


class Compress(Stage):
    """From the target to a proxy and the server's layer map; healed and distilled where the recipe says so."""

    name, past = "compress", "compressed"
    reads = COMPRESS
    outputs = ("proxy", UNDISTILLED, LAYER_MAP)
    learns = (
        "seconds",
        "target_parameters",
        "proxy_parameters",
        "disclosed_parameters",
        "target_sha256",
        "block_scores",
    )

    def texts(self, config: RunConfig) -> tuple[int, ...]:
        """Return how many texts compression, healing and distillation read."""
        return rows_read(config)

    def do(self, run: Run) -> None:
        """Write ``proxy/`` and, last, the server's layer map.

        Raises:
            DataError: If there is too little public text; nothing is compressed then.
        """
        config, started = run.config, time.perf_counter()
        texts, cases, lessons = (
            public_texts(config.compression.calibration, run.clients.owned, rows=rows, seed=config.seed) if rows else []
            for rows in rows_read(config)
        )
        target, _ = run.target
        proxy, layer_map, scores = _cut(run, texts)
        shown = config.compression.block_scores(len(Decoder.of(target)), scores)
        if config.healing.rows:
            heal(run, proxy, layer_map, cases)
        compressed = time.perf_counter()
        if config.distillation.steps:
            # Kept by the server, so that what distillation and what tuning changed can be told apart later.
            _save(run, proxy, run.folder.undistilled, model_card("proxy", {}))
            distil(run, proxy, layer_map, lessons)
        run.note(
            target_parameters=parameter_count(target),
            proxy_parameters=parameter_count(proxy),
            disclosed_parameters=disclosed_count(proxy, layer_map),
            target_sha256=layer_map.target_sha256,
            block_scores=None if shown is None else shown.tolist(),
        )
        run.note_seconds("compression", compressed - started)
        run.note_seconds("distillation", time.perf_counter() - compressed)
        card = model_card("proxy", {}, parameters=run.facts.proxy_parameters)
        _save(run, proxy, run.folder.proxy, card)
        layer_map.save(run.folder.layer_map)  # last: its presence says that all is there


def _save(run: Run, proxy: PreTrainedModel, folder: Path, card: str) -> None:
    template, most = run.facts.template, run.config.target.max_shard_size
    save_model(proxy, run.target[1], folder, card=card, anonymous=True, template=template, max_shard_size=most)


def _cut(run: Run, texts: Sequence[str]) -> tuple[PreTrainedModel, LayerMap, Any]:
    """Return the proxy as the compressor makes it, its layer map, and the scores that it went by."""
    config, (target, tokenizer) = run.config, run.target
    limit = positions_limit(target, config.compression.calibration.max_tokens)
    batches = text_batches(texts, tokenizer, max_tokens=limit)
    with run.display.bar("reading calibration text", len(batches)) as bar, placed(target, run.device):
        check_target(target)
        if config.client.packing and config.federation.rounds:
            check_packing(target)
        scores = config.compression.score(Decoder.of(target), _stepped(batches, bar))
    release()  # the target's blocks come one at a time from here on
    proxy, layer_map = config.compression.build(target, scores)
    run.display.say(f"compressed: {describe(layer_map, len(Decoder.of(target)))} ({config.compression.name})")
    return proxy, layer_map, scores


def describe(layer_map: LayerMap, depth: int) -> str:
    """Return in words what of a target of ``depth`` blocks is in the proxy."""
    words = f"{len(layer_map.centres)} of {depth} blocks kept"
    if len(layer_map.centres) < len(layer_map.proxy_to_target):
        words += f", in {len(layer_map.proxy_to_target)} places"
    return words if layer_map.neurons is None else f"{words}, {len(layer_map.neurons[0])} neurons in each"


def heal(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, texts: Sequence[str]) -> None:
    """Fit the blocks before the proxy's gaps to the target on public texts, in place."""
    from fedproxy.strategies.compression.healing import heal as fit

    target, tokenizer = run.target
    limit = positions_limit(target, run.config.compression.calibration.max_tokens)
    with run.display.counter("healing") as advance, placed(target, run.device), placed(proxy, run.device):
        found = fit(
            proxy,
            target,
            text_batches(texts, tokenizer, max_tokens=limit),
            layer_map=layer_map,
            ridge=run.config.healing.ridge,
            advance=advance,
        )
    errors = ", ".join(
        f"block {gap.block} ({gap.removed} removed) {gap.before:.3f} to {gap.after:.3f}" for gap in found
    )
    run.display.say(
        f"healed: error of hidden states behind {errors}" if found else "healed: no block has a gap behind it"
    )


def distil(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, texts: Sequence[str]) -> None:
    """Distil the target into the proxy on public texts, in place."""
    from fedproxy.strategies.compression.distilling import distil as fit

    settings = run.config.distillation
    target, tokenizer = run.target
    limit = positions_limit(target, run.config.compression.calibration.max_tokens)
    batches = text_batches(texts, tokenizer, max_tokens=limit, batch_size=settings.batch_size)
    with run.display.counter("distilling") as advance:
        loss = fit(
            proxy,
            target,
            batches,
            settings=settings,
            layer_map=layer_map,
            trainer=one_device(run.config.trainer),
            generator=generator(run.config.seed, "distillation"),
            cache=cache_root() / "teacher",
            logs=run.folder.trainer_logs / "distillation",
            advance=advance,
        )
    run.display.say(f"distilled: {settings.steps} steps, loss {loss:.3f}")


def _stepped(batches: Iterable[Batch], bar: Bar) -> Iterator[Batch]:
    """Pass batches on and move the bar with each."""
    for batch in batches:
        yield batch
        bar.step()


HELD_OUT_ROWS = 64
"""Texts that fidelity is measured on."""
_TEXTS_PER_PASS = 4  # logits of all positions are held, for both models


def fidelity_texts(config: RunConfig, owned: Container[str]) -> list[str]:
    """Return the public texts to measure fidelity on, which neither compression nor distillation reads.

    Args:
        config: The recipe.
        owned: Clients' texts, which it must not read.

    Raises:
        DataError: If none is left.
    """
    calibration = config.compression.calibration
    return held_out_texts(calibration, owned, used=texts_read(config), rows=HELD_OUT_ROWS, seed=config.seed)


class Measure(Stage):
    """How near the proxy is to the target on held-out public text, with the Block Influence of every block.

    Args:
        texts: The text, none of which calibrated or distilled the proxy.
    """

    name, past = "measure", "measured"
    reads, after = FIDELITY, (Compress,)
    outputs = ("block_influence.png",)

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def do(self, run: Run) -> None:
        """Note the fidelity, and the blocks' influence where the compressor did not take it; write the plot.

        Raises:
            DataError: If no text has two tokens.
            CheckpointError: If the plot cannot be written.
        """
        if run.facts.fidelity is None:
            _measure(run, self._texts)
        scores = run.facts.block_scores
        assert scores is not None  # _measure noted them
        write_influence_plot(CompressionReport(scores, run.layer_map.proxy_to_target), run.folder.influence_plot)


def _measure(run: Run, texts: Sequence[str]) -> None:
    config, started = run.config, time.perf_counter()
    calibration = config.compression.calibration
    target, tokenizer = run.target
    limit = positions_limit(target, calibration.max_tokens)
    proxy = run.proxy()
    scores = run.facts.block_scores
    with placed(target, run.device):
        if scores is None:
            known = public_texts(calibration, run.clients.owned, rows=calibration.rows, seed=config.seed)
            scores = block_influence(Decoder.of(target), text_batches(known, tokenizer, max_tokens=limit)).tolist()
        with placed(proxy, run.device):
            batches = text_batches(texts, tokenizer, max_tokens=limit, batch_size=_TEXTS_PER_PASS)
            found = compare(target, proxy, batches)
    run.note(fidelity=dataclasses.asdict(found), block_scores=scores)
    run.note_seconds("fidelity", time.perf_counter() - started)
    run.display.say(
        f"fidelity on {found.tokens} held-out tokens: KL {found.kl:.3f}, perplexity {found.proxy_perplexity:.1f} "
        f"(target {found.target_perplexity:.1f})"
    )

"""Stage (i): from the target to a proxy."""

import dataclasses
import hashlib
import time
from collections.abc import Container, Iterable, Iterator, Sequence

from transformers import PreTrainedModel

from fedproxy.config import RunConfig
from fedproxy.data.assets import cache_root
from fedproxy.federation.client_rows import ClientRows
from fedproxy.files import write_text
from fedproxy.models import Decoder, LayerMap, load_model, placed, save_model
from fedproxy.models.decoder import disclosed_count, parameter_count, positions_limit
from fedproxy.models.probing import check_target
from fedproxy.modules.devices import one_device
from fedproxy.modules.fidelity import compare
from fedproxy.pipeline.context import LAYER_MAP, UNDISTILLED, Run
from fedproxy.pipeline.data import held_out_texts, public_texts, text_batches, texts_read
from fedproxy.pipeline.display import Bar
from fedproxy.reporting import CompressionReport, model_card
from fedproxy.reporting.block_plot import write_influence_plot
from fedproxy.seeding import generator
from fedproxy.strategies.compression.base import Batch
from fedproxy.strategies.compression.block_influence import block_influence


def compress(run: Run, clients: ClientRows) -> None:
    """Stage (i): write ``proxy/`` and, last, the server's layer map.

    Raises:
        DataError: If there is too little public text; nothing is compressed then.
    """
    if run.folder.layer_map.is_file():
        run.verify("proxy", UNDISTILLED, LAYER_MAP)
        return
    config, started = run.config, time.perf_counter()
    calibration, healing, distillation = config.compression.calibration, config.healing, config.distillation
    texts, cases, lessons = (
        public_texts(calibration, clients.owned, rows=rows, seed=config.seed) if rows else []
        for rows in (calibration.rows, healing.rows, distillation.rows if distillation.steps else 0)
    )
    target, tokenizer = run.target()
    batches = text_batches(texts, tokenizer, max_tokens=positions_limit(target, calibration.max_tokens))
    with run.display.bar("reading calibration text", len(batches)) as bar, placed(target, run.device):
        check_target(target)
        scores = config.compression.score(Decoder.of(target), _stepped(batches, bar))
    proxy, layer_map = config.compression.build(target, scores)
    depth, shown = len(Decoder.of(target)), config.compression.block_scores(len(Decoder.of(target)), scores)
    run.display.say(f"compressed: {describe(layer_map, depth)} ({config.compression.name})")
    if healing.rows:
        heal(run, proxy, layer_map, cases)
    compressed = time.perf_counter()
    if distillation.steps:
        # Kept by the server, so that what distillation and what tuning changed can be told apart later.
        save_model(proxy, tokenizer, run.folder.undistilled, card=model_card("proxy", {}), anonymous=True)
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
    card = model_card("proxy", {}, parameters=run.facts["proxy_parameters"])
    save_model(proxy, tokenizer, run.folder.proxy, card=card, anonymous=True)
    run.facts.pop("key", None)  # of rounds on an earlier proxy
    run.keep("proxy", UNDISTILLED)
    text = layer_map.to_json()
    run.note(files={**run.facts["files"], LAYER_MAP: hashlib.sha256(text.encode()).hexdigest()})
    write_text(run.folder.layer_map, text)  # last: its presence says that all is there


def describe(layer_map: LayerMap, depth: int) -> str:
    """Return in words what of a target of ``depth`` blocks is in the proxy."""
    words = f"{len(layer_map.centres)} of {depth} blocks kept"
    if len(layer_map.centres) < len(layer_map.proxy_to_target):
        words += f", in {len(layer_map.proxy_to_target)} places"
    return words if layer_map.neurons is None else f"{words}, {len(layer_map.neurons[0])} neurons in each"


def heal(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, texts: Sequence[str]) -> None:
    """Fit the blocks before the proxy's gaps to the target on public texts, in place."""
    from fedproxy.strategies.compression.healing import heal as fit

    target, tokenizer = run.target()
    limit = positions_limit(target, run.config.compression.calibration.max_tokens)
    with placed(target, run.device), placed(proxy, run.device):
        found = fit(
            proxy,
            target,
            text_batches(texts, tokenizer, max_tokens=limit),
            layer_map=layer_map,
            ridge=run.config.healing.ridge,
        )
    errors = ", ".join(
        f"block {gap.block} ({gap.removed} removed) {gap.before:.3f} to {gap.after:.3f}" for gap in found
    )
    run.display.say(
        f"healed: error of hidden states behind {errors}" if found else "healed: no block has a gap behind it"
    )


def distil(run: Run, proxy: PreTrainedModel, layer_map: LayerMap, texts: Sequence[str]) -> None:
    """Distil the target into the proxy on public texts, in place."""
    from fedproxy.modules.distillation import distil as fit

    settings = run.config.distillation
    target, tokenizer = run.target()
    limit = positions_limit(target, run.config.compression.calibration.max_tokens)
    batches = text_batches(texts, tokenizer, max_tokens=limit, batch_size=settings.batch_size)
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


def measure_fidelity(run: Run, owned: Container[str], texts: Sequence[str]) -> None:
    """Note how near ``proxy/`` is to the target, and the blocks' influence where the compressor did not take it.

    Args:
        run: The run, compressed.
        owned: Clients' texts, which it must not read.
        texts: :func:`fidelity_texts`.

    Raises:
        DataError: If no text has two tokens.
        CheckpointError: If the plot cannot be written.
    """
    if run.facts.get("fidelity") is None:
        _measure(run, owned, texts)
    scores = run.facts["block_scores"]
    kept = run.layer_map().proxy_to_target
    write_influence_plot(CompressionReport(scores, kept), run.folder.influence_plot)


def _measure(run: Run, owned: Container[str], texts: Sequence[str]) -> None:
    config, started = run.config, time.perf_counter()
    calibration = config.compression.calibration
    target, tokenizer = run.target()
    limit = positions_limit(target, calibration.max_tokens)
    proxy = load_model(run.folder.proxy, dtype=config.target.dtype)
    scores = run.facts.get("block_scores")
    with placed(target, run.device):
        if scores is None:
            known = public_texts(calibration, owned, rows=calibration.rows, seed=config.seed)
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

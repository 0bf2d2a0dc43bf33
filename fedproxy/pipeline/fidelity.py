"""The fidelity of a finished proxy: measured on held-out public text, with the Block Influence of every block."""

import dataclasses
import time
from collections.abc import Container, Sequence

from fedproxy.config import RunConfig
from fedproxy.models import Decoder, load_model, placed
from fedproxy.models.decoder import positions_limit
from fedproxy.modules.fidelity import compare
from fedproxy.pipeline.data import held_out_texts, public_texts, text_batches, texts_read
from fedproxy.pipeline.stages import Run
from fedproxy.reporting import CompressionReport
from fedproxy.reporting.block_plot import write_influence_plot
from fedproxy.strategies.compression.block_influence import block_influence

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

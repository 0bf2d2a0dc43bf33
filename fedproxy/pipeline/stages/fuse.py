"""Stage (iii) of a run: what the proxies learned goes back into the target."""

import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from fedproxy.config import to_dict
from fedproxy.data.templates import unmarked
from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.files import ServerFiles
from fedproxy.files import whole_folder
from fedproxy.models import placed, save_model
from fedproxy.models.anonymity import with_template
from fedproxy.models.decoder import Overlay, positions_limit
from fedproxy.modules.text_nll import text_nll
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.pipeline.reads import FUSE
from fedproxy.pipeline.stage import Stage
from fedproxy.pipeline.stages.federate import Federate
from fedproxy.pipeline.tuned import MERGED, TunedProxies, TunedProxy, final_states, folder_of
from fedproxy.protocol import Tensors
from fedproxy.reporting import model_card
from fedproxy.seeding import derive_seed
from fedproxy.strategies.fusion.base import Judge
from fedproxy.strategies.trainable.base import TrainableModel


class Fuse(Stage):
    """What the proxies learned goes back into the target: ``adapter/`` and ``fused/``.

    Where every client has a state of its own, both folders hold one folder per client.
    """

    name, past = "fuse", "fused"
    reads, after = FUSE, (Federate,)
    outputs = ("adapter", "fused")

    def inputs(
        self, run: Run, tell: Callable[[str], Any], before: Callable[[Stage], Any], *, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return what fusion depends on: of a run's rounds, which one's state is fused."""
        return {**super().inputs(run, tell, before, without=without), "round": run.after_federation[1].round}

    def do(self, run: Run) -> None:
        """Write what was trained and the fused model, once per round count."""
        started = time.perf_counter()
        model, progress = run.after_federation
        run.folder.check_fused()
        states = _states(run, progress)
        for client, state in states.items():
            if client != MERGED:  # the one model of merged clients comes as federation left it
                model.load_state(state)
            _save_adapter(model, folder_of(run.folder.adapter, client))
        run.tuned = _tuned(run)
        for client in states:
            plug_in(run, run.tuned[client], client)
        run.note(fused_after_round=progress.round)
        run.note_seconds("fusion", time.perf_counter() - started)

    def load(self, run: Run) -> None:
        """Put the tuned proxies into ``run.tuned``."""
        if run.tuned is None:
            run.tuned = _tuned(run)


def _states(run: Run, progress: Progress) -> Mapping[str, Tensors]:
    return final_states(run.config, progress, ServerFiles(run.folder.checkpoints), run.clients)


def _tuned(run: Run) -> TunedProxies:
    """Return the tuned proxies, and take the trained model apart for it."""
    model, progress = run.after_federation
    states = _states(run, progress)
    trainable = run.config.trainable.placed(run.layer_map)
    merged = model.merged_weights() if MERGED in states else None
    proxy = _as_broadcast(run, model)
    known = None if merged is None else TunedProxy(proxy, merged, progress.remembered("emulator"))
    return TunedProxies(proxy, trainable, states, seed=run.config.seed, known=known)


def _save_adapter(model: TrainableModel, folder: Path) -> None:
    """Write what was trained, whole or not at all.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    if not model.num_parameters:
        return
    try:
        with whole_folder(folder) as part:
            model.save_adapter(part)
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        raise CheckpointError(f"{folder} cannot be written: {error}; free disk space, then resume=auto") from error


def _as_broadcast(run: Run, model: TrainableModel) -> PreTrainedModel:
    """Return the proxy as it was before tuning, read again if its frozen weights were moved."""
    proxy, moved = model.detach(), model.frozen_round
    return run.proxy() if moved else proxy


def plug_in(run: Run, tuned: TunedProxy, client: str) -> None:
    """Fuse one tuned proxy, that of ``client`` or :data:`MERGED`, with the target and write the result."""
    target, tokenizer = run.fusible_target, run.target[1]
    layer_map = run.layer_map
    weights = Overlay(tuned.proxy.state_dict(), tuned.merged)
    fusion = run.config.fusion
    if fusion.judged_texts:
        fusion = fusion.settle(
            target, tuned.proxy, weights, layer_map, judge(run, fusion.judged_texts, run.clients.owned)
        )
        chosen = to_dict(fusion)
        run.display.say(f"chosen on public text: fusion scale {chosen.get('scale')}")
        run.note(fusion={**run.facts.fusion, client or "fused": chosen})
    fused = fusion.join(target, tuned.proxy, weights, layer_map)
    parameters = run.facts.target_parameters
    card = model_card("fused", {}, method=run.config.method, parameters=parameters, wrapper=fusion.adds_logits)
    if tokenizer.chat_template is None:  # the target's own stays
        tokenizer = with_template(tokenizer, unmarked(run.facts.template))
    folder, most = folder_of(run.folder.fused, client), run.config.target.max_shard_size
    save_model(fused, tokenizer, folder, card=card, max_shard_size=most)


def judge(run: Run, rows: int, owned: Container[str]) -> Judge:
    """Return a function that gives a model's negative log-likelihood on public text, nats per token."""
    target, tokenizer = run.target
    calibration, seed = run.config.compression.calibration, derive_seed(run.config.seed, "fusion")
    texts = public_texts(calibration, owned, rows=rows, seed=seed)
    batches = text_batches(texts, tokenizer, max_tokens=positions_limit(target, calibration.max_tokens), batch_size=4)

    def loss(model: PreTrainedModel) -> float:
        with placed(model, run.device):
            return text_nll(model, batches)

    return loss

"""Stage (iii) of a run: what the proxies learned goes back into the target."""

import time
from collections.abc import Container
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from fedproxy.config import to_dict
from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import Progress
from fedproxy.federation.server.files import ServerFiles
from fedproxy.files import whole_folder
from fedproxy.models import load_model, load_tokenizer, placed, save_model
from fedproxy.models.decoder import positions_limit
from fedproxy.models.logit_offset import require_same_vocabulary
from fedproxy.modules.text_nll import text_nll
from fedproxy.pipeline.data import public_texts, text_batches
from fedproxy.pipeline.stages import Run
from fedproxy.pipeline.tuned import MERGED, TunedProxies, TunedProxy, final_states, folder_of
from fedproxy.reporting import model_card
from fedproxy.seeding import derive_seed
from fedproxy.strategies.fusion.base import Judge
from fedproxy.strategies.trainable.base import TrainableModel


def fuse(run: Run, model: TrainableModel, progress: Progress, clients: ClientRows) -> TunedProxies:
    """Stage (iii): write ``adapter/`` and ``fused/``, once per round count, and return the tuned proxy.

    Where every client has a state of its own, both folders hold one folder per client.
    """
    started = time.perf_counter()
    config = run.config
    states = final_states(config, progress, ServerFiles(run.folder.checkpoints), clients)
    done = run.facts.get("fused_after_round") == progress.round and _is_whole(run)
    if not done:
        run.folder.check_fused()
        for client, state in states.items():
            if client != MERGED:  # the one model of merged clients comes as federation left it
                model.load_state(state)
            _save_adapter(model, folder_of(run.folder.adapter, client))
    trainable = config.trainable.placed(run.layer_map())
    merged = dict(model.merged_weights()) if MERGED in states else None
    proxy = _as_broadcast(run, model)
    known = None if merged is None else TunedProxy(proxy, merged, progress.remembered("emulator"))
    tuned = TunedProxies(proxy, trainable, states, seed=config.seed, known=known)
    if done:
        return tuned
    for client in states:
        plug_in(run, tuned[client], client, clients.owned)
    run.keep("adapter", "fused")
    run.note(fused_after_round=progress.round)
    run.note_seconds("fusion", time.perf_counter() - started)
    return tuned


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


def _is_whole(run: Run) -> bool:
    if not run.folder.fused.is_dir():
        return False
    try:
        run.verify("adapter", "fused")
    except CheckpointError as error:
        run.display.say(f"fused again: {error}")
        return False
    return True


def _as_broadcast(run: Run, model: TrainableModel) -> PreTrainedModel:
    """Return the proxy as it was before tuning, read again if its frozen weights were moved."""
    proxy, moved = model.detach(), model.frozen_round
    return load_model(run.folder.proxy, dtype=run.config.target.dtype) if moved else proxy


def plug_in(run: Run, tuned: TunedProxy, client: str, owned: Container[str]) -> None:
    """Fuse one tuned proxy, that of ``client`` or :data:`MERGED`, with the target and write the result."""
    target, tokenizer = run.target()
    layer_map = run.layer_map()
    weights = {**tuned.proxy.state_dict(), **tuned.merged}
    fusion = run.config.fusion
    if fusion.judged_texts:
        fusion = fusion.settle(target, tuned.proxy, weights, layer_map, judge(run, fusion.judged_texts, owned))
        chosen = to_dict(fusion)
        run.display.say(f"chosen on public text: fusion scale {chosen.get('scale')}")
        run.note(fusion={**run.facts.get("fusion", {}), client or "fused": chosen})
    fused = fusion.fuse(target, tuned.proxy, weights, layer_map)
    parameters = run.facts["target_parameters"]
    card = model_card("fused", {}, method=run.config.method, parameters=parameters, wrapper=fusion.adds_logits)
    save_model(fused, tokenizer, folder_of(run.folder.fused, client), card=card)


def judge(run: Run, rows: int, owned: Container[str]) -> Judge:
    """Return a function that gives a model's negative log-likelihood on public text, nats per token."""
    target, tokenizer = run.target()
    calibration, seed = run.config.compression.calibration, derive_seed(run.config.seed, "fusion")
    texts = public_texts(calibration, owned, rows=rows, seed=seed)
    batches = text_batches(texts, tokenizer, max_tokens=positions_limit(target, calibration.max_tokens), batch_size=4)

    def loss(model: PreTrainedModel) -> float:
        with placed(model, run.device):
            return text_nll(model, batches)

    return loss


def check_vocabulary(run: Run) -> None:
    """Refuse, before any client trains, a fusion that adds logits over two vocabularies.

    Raises:
        ModelError: Naming a token that differs.
    """
    if run.config.fusion.adds_logits:
        path = resolve(run.config.target.path) or run.config.target.path
        require_same_vocabulary(load_tokenizer(path).get_vocab(), load_tokenizer(run.folder.proxy).get_vocab())

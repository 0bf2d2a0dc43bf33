"""The run's texts: clients' rows, tokenised, and public calibration text that no client owns."""

import hashlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedproxy.config import DataConfig, RunConfig
from fedproxy.data.assets import resolve
from fedproxy.data.rows import Row
from fedproxy.data.sources import Columns, count_texts, read_rows, read_texts
from fedproxy.data.tokenisation import cut_counts, encoding, tokenise
from fedproxy.errors import ConfigError, DataError
from fedproxy.evaluation.task_rows import render_rows
from fedproxy.models.checkpoints import special_ids
from fedproxy.models.positions import positions
from fedproxy.pipeline.planning.outline import target_config
from fedproxy.seeding import derive_seed, generator
from fedproxy.strategies.compression import CalibrationConfig

CALIBRATION_BATCH = 16
"""Texts per pass over calibration text."""
_ROWS_AT_ONCE = 4096
"""Rows whose tokens lie in memory at once while they are counted."""


def client_rows(config: DataConfig, *, seed: int) -> dict[str, list[Row]]:
    """Return every client's rows: tasks rendered as lm-eval renders them, files as they are, sampled, partitioned.

    Raises:
        DataError: If a source or a row cannot be used, or a client would own no row.
    """
    rows: list[Row] = []
    for task in config.tasks:
        found = render_rows(task, "train", limit=config.rows_per_task, seed=derive_seed(seed, "rows", task))
        rows += _ending(found, config.end_token == "always")
    for name in config.files:
        rows += _sample(file_rows(config, name), config.rows_per_task, seed=seed, source=name)
    return config.partition.split(rows, seed)


def file_rows(config: DataConfig, name: str) -> list[Row]:
    """Return all rows of one of ``data.files``."""
    return _rows_of(config, name, config.files[name], config.label_column)


def evaluation_rows(config: RunConfig) -> dict[str, list[Row]]:
    """Return the held-out rows of ``evaluation.files``, by name; they are read as those of ``data.files``.

    Raises:
        DataError: If a file or a row cannot be used.
        ConfigError: If a file is trained on.
    """
    trained = {str(resolve(path) or path): name for name, path in config.data.files.items()}
    found = {}
    for name, path in config.evaluation.files.items():
        other = trained.get(str(resolve(path) or path))
        if other is not None:
            raise ConfigError(
                f"evaluation.files.{name} is data.files.{other}, which clients train on; give rows that nobody does"
            )
        found[name] = _rows_of(config.data, name, path, None)
    return found


def _rows_of(config: DataConfig, name: str, path: str, label: str | None) -> list[Row]:
    columns = Columns(config.prompt_column, config.target_column, label)
    return _ending(read_rows(name, path, columns=columns), config.end_token != "never")


def _ending(rows: list[Row], ends: bool) -> list[Row]:
    return [replace(row, ends=True) for row in rows] if ends else rows


def tokenised_lengths(
    clients: Mapping[str, Sequence[Row]], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int | None]:
    """Tokenise all clients' rows as clients will, and return what becomes of them: how many there are, and are cut.

    Raises:
        DataError: If nothing of a row's answer is left, or its end token is asked for and the tokenizer has none.
    """
    if config.data.end_token == "always" and tokenizer.eos_token_id is None:
        raise DataError(
            f"data.end_token=always: the tokenizer of target.path={config.target.path} has no end-of-sequence token; "
            "use data.end_token=auto, or give the tokenizer one"
        )
    model, data, end = target_config(config), config.data, tokenizer.eos_token_id
    most = positions(model)
    cut = Counter[str]()
    for own in clients.values():
        for start in range(0, len(own), _ROWS_AT_ONCE):
            examples = tokenise(
                own[start : start + _ROWS_AT_ONCE],
                tokenizer,
                max_input_tokens=data.max_input_tokens,
                max_target_tokens=data.max_target_tokens,
                max_tokens=most,
            )
            cut.update(cut_counts(examples))
    ending = any(row.ends for own in clients.values() for row in own)
    stops = [token for name, token in special_ids(model.get_text_config()) if name == "eos_token_id"]
    return {
        "rows": sum(map(len, clients.values())),
        **cut,
        "positions": most,
        "endless": int(ending and end is None),
        "unstopped": int(ending and end is not None and bool(stops) and end not in stops),
    }


def length_notes(found: Mapping[str, int | None], config: DataConfig) -> list[str]:
    """Return in sentences which rows were cut, and whether targets lack an end token that the recipe asks for."""
    notes = []
    if found.get("cut"):
        most = found["positions"]
        room = "" if most is None else f", {most} positions of the model"
        notes.append(
            f"{found['cut']} of {found['rows']} rows are cut to fit: prompts of {found['prompts']}, targets of "
            f"{found['targets']} (data.max_input_tokens={config.max_input_tokens}, "
            f"data.max_target_tokens={config.max_target_tokens}{room})."
        )
    if found.get("endless"):
        notes.append("The tokenizer has no end-of-sequence token: targets of data.files are trained without an end.")
    if found.get("unstopped"):
        notes.append(
            "Targets end with the tokenizer's end-of-sequence token, and the model's eos_token_id is another one: "
            "generation does not stop there by itself."
        )
    return notes


def _sample(rows: Sequence[Row], count: int | None, *, seed: int, source: str) -> list[Row]:
    if count is None or count >= len(rows):
        return list(rows)
    order = torch.randperm(len(rows), generator=generator(seed, "rows", source))[:count]
    return [rows[i] for i in sorted(order.tolist())]


def rows_sha256(clients: Mapping[str, Sequence[Row]]) -> str:
    """Return the hash of all clients' rows, whoever owns them."""
    digest = hashlib.sha256()
    for key, prompt, target in sorted((row.key, row.prompt, row.target) for own in clients.values() for row in own):
        digest.update(f"{key}\x00{prompt}\x00{target}\x00".encode())
    return digest.hexdigest()


def public_texts(config: CalibrationConfig, owned: Container[str], *, rows: int, seed: int) -> list[str]:
    """Return calibration texts, without any that a client's row holds (``owned``).

    Raises:
        DataError: If nothing is left.
    """
    texts = read_texts(config.path, rows, derive_seed(seed, "calibration"))
    public = [text for text in texts if text not in owned]
    if not public:
        raise DataError(f"compression.calibration.path={config.path}: every text is a client's row; give public text")
    return public


def texts_read(config: RunConfig) -> int:
    """Return how many calibration texts making the proxy reads, before clients' rows are left out."""
    distilled = config.distillation.rows if config.distillation.steps else 0
    return max(config.compression.calibration.rows, config.healing.rows, distilled)


def held_out_texts(config: CalibrationConfig, owned: Container[str], *, used: int, rows: int, seed: int) -> list[str]:
    """Return up to ``rows`` public texts beyond the ``used`` ones that compression and distillation read.

    Raises:
        DataError: If there is none, or there are fewer than ``used``.
    """
    available = check_held_out(config, used=used)
    seen = public_texts(config, owned, rows=used, seed=seed)
    texts = public_texts(config, owned, rows=min(used + rows, available), seed=seed)[len(seen) :]
    if not texts:
        raise _no_held_out(config, available, used)
    return texts


def check_held_out(config: CalibrationConfig, *, used: int) -> int:
    """Return how many texts there are, if that is more than the ``used`` ones.

    Raises:
        DataError: If it is not.
    """
    available = count_texts(config.path)
    if available <= used:
        raise _no_held_out(config, available, used)
    return available


def _no_held_out(config: CalibrationConfig, available: int, used: int) -> DataError:
    return DataError(
        f"compression.calibration.path={config.path} holds {available} texts and compression reads {used}; add "
        "some, so that fidelity can be measured on others"
    )


def text_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, batch_size: int = CALIBRATION_BATCH
) -> list[dict[str, Tensor]]:
    """Tokenise texts, cut long ones from the right, and pad them in batches of similar length.

    Returns:
        Batches of ``input_ids`` and ``attention_mask``, int64 (batch, tokens).
    """
    with encoding():
        encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    encoded = sorted((ids for ids in encoded if ids), key=len)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches: list[dict[str, Tensor]] = []
    for start in range(0, len(encoded), batch_size):
        part = [torch.tensor(ids) for ids in encoded[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches

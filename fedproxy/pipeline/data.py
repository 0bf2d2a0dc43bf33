"""The run's texts: clients' rows, tokenised, and public calibration text that no client owns."""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedproxy.config import DataConfig, RunConfig
from fedproxy.data.assets import resolve
from fedproxy.data.encoding import as_it_was
from fedproxy.data.formats import DataFormat
from fedproxy.data.holdout import hold_out
from fedproxy.data.records import Columns
from fedproxy.data.rows import Row
from fedproxy.data.sources import Source, count_texts, ending, read_source, read_texts
from fedproxy.data.templates import chat_template
from fedproxy.data.tokenisation import cut_counts, encoding, tokenise
from fedproxy.errors import ConfigError, DataError, one_line
from fedproxy.evaluation.task_rows import render_rows
from fedproxy.models import load_tokenizer
from fedproxy.models.anonymity import named_in
from fedproxy.models.checkpoints import special_ids
from fedproxy.models.positions import positions
from fedproxy.pipeline.planning.outline import CALIBRATION_BATCH, target_config
from fedproxy.pipeline.unseen import check_unseen_file, files_trained_on
from fedproxy.seeding import derive_seed, generator
from fedproxy.strategies.compression import CalibrationConfig

_ROWS_AT_ONCE = 4096
"""Rows whose tokens lie in memory at once while they are counted."""


@dataclass(frozen=True)
class Dealt:
    """Who owns which row."""

    clients: dict[str, list[Row]]
    """Every client's rows, held-out ones among them."""
    notes: list[str]
    """In sentences: formats that were found out, held-out rows that were dropped."""


def deal(config: DataConfig, *, seed: int) -> Dealt:
    """Read all sources and deal their rows out.

    Tasks are rendered as lm-eval renders them, files are read in their format; rows are sampled, held out and weighed,
    then partitioned.

    Raises:
        DataError: If a source or a row cannot be used, or a client would own no row to train on.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for task in config.tasks:
        found = render_rows(task, "train", limit=config.rows_per_task, seed=derive_seed(seed, "rows", task))
        rows += _ending(found, config.end_token == "always")
    for name in config.files:
        source = _read(config, name, config.files[name])
        if (config.format.name == "auto" and name not in config.formats) or config.formats.get(name) == "auto":
            notes.append(f"data.files.{name} was read as {source.form} (data.format.name=auto).")
        rows += _sample(source.rows, config.rows_per_task, seed=seed, source=name)
    if config.holdout is not None:
        rows, said = hold_out(rows, config.holdout, seed)
        notes += said
    clients = config.partition.split(_weighed(rows, config.weights, seed), seed)
    for client, own in clients.items():
        if all(row.held_out for row in own):
            raise DataError(
                f"data.holdout={config.holdout}: all {len(own)} rows of client {client!r} would be held out; hold out "
                "fewer, or give it more rows"
            )
    return Dealt(clients, notes)


def client_rows(config: DataConfig, *, seed: int) -> dict[str, list[Row]]:
    """Return every client's rows; see :func:`deal`."""
    return deal(config, seed=seed).clients


def file_rows(config: DataConfig, name: str) -> list[Row]:
    """Return all rows of one of ``data.files``."""
    return _read(config, name, config.files[name]).rows


def evaluation_rows(config: RunConfig) -> dict[str, list[Row]]:
    """Return the held-out rows of ``evaluation.files``, by name; they are read as those of ``data.files``.

    Raises:
        DataError: If a file or a row cannot be used.
        ConfigError: If a file is trained on.
    """
    trained = files_trained_on(config.data) if config.evaluation.files else {}
    columns = Columns(config.data.prompt_column, config.data.target_column)  # no label and no owner is needed
    found = {}
    for name, path in config.evaluation.files.items():
        check_unseen_file(name, path, trained)
        found[name] = _read(config.data, name, path, columns).rows
    return found


def _read(config: DataConfig, name: str, path: str, columns: Columns | None = None) -> Source:
    own = Columns(config.prompt_column, config.target_column, config.label_column, config.partition.owner_column)
    named = config.formats.get(name, config.format.name)
    form = config.format if named == config.format.name else DataFormat.by_name(named)()
    source = read_source(name, path, columns=columns or own, form=form)
    return replace(source, rows=ending(source.rows, config.end_token))


def _ending(rows: list[Row], ends: bool) -> list[Row]:
    return [replace(row, ends=True) for row in rows] if ends else rows


def _weighed(rows: Sequence[Row], weights: Mapping[str, float], seed: int) -> list[Row]:
    """Give training rows the number of times that they stand in an epoch; those that stand in none are left out."""
    result = list(rows)
    for source, weight in weights.items():
        own = [index for index, row in enumerate(result) if row.source == source and not row.held_out]
        often, part = divmod(weight, 1.0)
        order = torch.randperm(len(own), generator=generator(seed, "weight", source)).tolist()
        more = {own[index] for index in order[: round(part * len(own))]}
        if own and not often and not more:
            raise DataError(
                f"data.weights.{source}={weight:g}: that share of its {len(own)} rows is less than half a row, and "
                "none is left to train on; give it more, or leave the source out"
            )
        for index in own:
            result[index] = replace(result[index], copies=int(often) + (index in more))
    return [row for row in result if row.copies]


def target_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Return the target's tokenizer, with the chat template that this run's conversations are framed by.

    Raises:
        ConfigError: If the template cannot be used.
    """
    tokenizer = load_tokenizer(resolve(config.target.path) or config.target.path)
    tokenizer.chat_template = chat_template(config.data.template, tokenizer)
    return tokenizer


def check_template(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that would tell clients the target's name.

    Args:
        config: The recipe.
        tokenizer: The target's, with the run's template.

    Raises:
        ConfigError: Naming the word.
    """
    word = named_in(str(tokenizer.chat_template), tokenizer.name_or_path, config.target.path)
    if word and not config.data.template_names_target:
        raise ConfigError(
            f"data.template={config.data.template}: the chat template holds {one_line(word, 40)!r}, which names the "
            "target, and clients would get it; use data.template=chatml, a file without the name, or "
            "data.template_names_target=true"
        )


def template_of(config: RunConfig) -> str:
    """Return the chat template that clients with conversations need.

    Raises:
        ConfigError: If it cannot be used, or names the target.
    """
    tokenizer = target_tokenizer(config)
    check_template(config, tokenizer)
    return str(tokenizer.chat_template)


@dataclass(frozen=True)
class Counted:
    """What becomes of all clients' rows where they are tokenised."""

    examples: dict[str, int]
    """Examples that each client trains on in an epoch."""
    lengths: dict[str, int | None]
    """Rows in all, and how many are cut, split, dropped or lack an end."""
    template: str | None = None
    """Chat template that clients need; None where no row is a conversation."""


def count_examples(clients: Mapping[str, Sequence[Row]], config: RunConfig) -> Counted:
    """Tokenise all clients' training rows as clients will, and count.

    Raises:
        ConfigError: If the chat template cannot be used, or names the target.
        DataError: If nothing of a row's answer or of a client's rows is left, a row cannot be rendered, or its end
            token is asked for and the tokenizer has none.
    """
    tokenizer = target_tokenizer(config)
    converse = any(row.messages for own in clients.values() for row in own)
    if converse:
        check_template(config, tokenizer)
    if config.data.end_token == "always" and tokenizer.eos_token_id is None:
        raise DataError(
            f"data.end_token=always: the tokenizer of target.path={config.target.path} has no end-of-sequence token; "
            "use data.end_token=auto, or give the tokenizer one"
        )
    model, data, end = target_config(config), config.data, tokenizer.eos_token_id
    most = positions(model)
    cut, counts = Counter[str](), dict.fromkeys(clients, 0)
    owned = [(client, row) for client, own in clients.items() for row in own if not row.held_out]
    for start in range(0, len(owned), _ROWS_AT_ONCE):
        owners = {row.key: client for client, row in owned[start : start + _ROWS_AT_ONCE]}
        rows = [row for _, row in owned[start : start + _ROWS_AT_ONCE]]
        examples = tokenise(
            rows,
            tokenizer,
            max_input_tokens=data.max_input_tokens,
            max_target_tokens=data.max_target_tokens,
            max_tokens=most,
            long_rows=data.long_rows,
        )
        cut.update(cut_counts(rows, examples))
        copies = {row.key: row.copies for row in rows}
        for example in examples:
            counts[owners[example.key]] += copies[example.key]
    for client in (client for client, count in counts.items() if not count):
        raise DataError(
            f"data.long_rows={data.long_rows}: all {len(clients[client])} rows of client {client!r} are too long; "
            "raise data.max_input_tokens and data.max_target_tokens, or use data.long_rows=cut"
        )
    ending = any(row.ends for own in clients.values() for row in own)
    stops = [token for name, token in special_ids(model.get_text_config()) if name == "eos_token_id"]
    lengths = {
        "rows": len(owned),
        **cut,
        "positions": most,
        "endless": int(ending and end is None),
        "unstopped": int(ending and end is not None and bool(stops) and end not in stops),
    }
    return Counted(counts, lengths, str(tokenizer.chat_template) if converse else None)


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
    if found.get("split"):
        notes.append(
            f"{found['split']} of {found['rows']} rows are split into windows (data.long_rows={config.long_rows})."
        )
    if found.get("dropped"):
        notes.append(
            f"{found['dropped']} of {found['rows']} rows are left out: too long (data.long_rows={config.long_rows})."
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
    parts = sorted((row.key, row.prompt, row.target, _turns(row)) for own in clients.values() for row in own)
    for key, prompt, target, turns in parts:
        digest.update(f"{key}\x00{prompt}\x00{target}\x00{turns}".encode())
    return digest.hexdigest()


def _turns(row: Row) -> str:
    return json.dumps([row.messages, row.tools], sort_keys=True) if row.messages else ""


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


def rows_read(config: RunConfig) -> tuple[int, int, int]:
    """Return how many calibration texts compression, healing and distillation read, clients' rows still among them."""
    distilled = config.distillation.rows if config.distillation.steps else 0
    return config.compression.calibration.rows, config.healing.rows, distilled


def texts_read(config: RunConfig) -> int:
    """Return how many calibration texts making the proxy reads, before clients' rows are left out."""
    return max(rows_read(config))


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
    with encoding(), as_it_was(tokenizer):
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

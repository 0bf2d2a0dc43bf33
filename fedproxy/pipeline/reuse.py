"""Work that several runs have in common, kept under the hash of all that it was made from.

Two runs share a proxy, a federation or an evaluation only where everything that could change a bit of it agrees:
weights, configuration, texts, rows, questions, versions, our own sources, device and threads. Names and paths of runs
and models are never compared.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fedproxy
from fedproxy import files
from fedproxy.config import RunConfig
from fedproxy.errors import CheckpointError
from fedproxy.evaluation.offline_tasks import offline_tasks
from fedproxy.evaluation.task_loading import needed_splits
from fedproxy.files import plain, private_folder
from fedproxy.models import state_sha256
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.data import public_texts
from fedproxy.pipeline.inputs import plugins
from fedproxy.pipeline.stage import Stage
from fedproxy.registry import Component
from fedproxy.reporting.provenance import hardware, versions
from fedproxy.sealed import read_sealed, write_sealed

_KEPT = re.compile(r"[0-9a-f]{32}(?:\.part)?")
"""What a folder of kept work is called: its key."""
_FOLDERS = {"compress": "proxies", "federate": "federations"}
"""Stages whose work is kept."""
_PLACES = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of a model's configuration that say where it came from, and nothing about what it computes."""


@dataclass(frozen=True)
class SharedWork:
    """A folder of proxies and federations, each under its key; of :mod:`~fedproxy.pipeline.kept_scores` too.

    Args:
        folder: Where they lie; made when first needed.
    """

    folder: Path

    def take(self, stage: Stage, run: Run) -> bool:
        """Give the run the files and facts that an equal stage left, as if it had made them itself.

        Returns:
            False where the run has begun the stage, nothing is kept, or a file was changed.
        """
        last = run.folder.root / stage.outputs[-1] if stage.outputs else None
        if last is None or last.is_file() or (last.is_dir() and any(last.iterdir())):
            return False
        kept = self._place(stage, run)
        if kept is None or not self._link(kept, run, last=stage.outputs[-1]):
            return False
        run.display.say(f"{stage.past}: taken from an equal run")
        return True

    def keep(self, stage: Stage, run: Run) -> None:
        """Leave a finished stage's outputs and facts to equal runs."""
        kept = self._place(stage, run)
        if kept is not None:
            learned = {name: getattr(run.facts, name) for name in stage.learns}
            self._keep(kept, run.folder.root, _files(run.folder.root, stage.outputs), learned)

    def _place(self, stage: Stage, run: Run) -> Path | None:
        if stage.name not in _FOLDERS:
            return None
        key = key_of(stage, run)
        return None if key is None else self.folder / _FOLDERS[stage.name] / key

    def clear(self) -> None:
        """Delete what is large, the proxies and federations; evaluations stay, and whatever else lies there."""
        for name in _FOLDERS.values():
            for kept in (self.folder / name).glob("*"):
                if _KEPT.fullmatch(kept.name) and not kept.is_symlink():
                    shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):
                (self.folder / name).rmdir()

    def _link(self, kept: Path, run: Run, *, last: str) -> bool:
        """Link kept files into the run's folder; ``last``, a file or a folder, appears whole and after all others."""
        manifest = _whole(kept / "manifest.json")
        if manifest is None or any(file_sha256(kept / name) != sha for name, sha in manifest["files"].items()):
            return False
        run.note(**manifest["facts"])
        root, part = run.folder.root, run.folder.root / ".taken"
        shutil.rmtree(part, ignore_errors=True)
        private_folder(part)
        for name in manifest["files"]:
            _link(kept / name, (part if name.startswith(last) else root) / name)
        if (part / last).is_dir():
            private_folder(part / last)
        (part / last).rename(root / last)
        shutil.rmtree(part)
        return True

    def _keep(self, kept: Path, root: Path, names: Iterable[str], facts: Mapping[str, Any]) -> None:
        part = kept.with_name(f"{kept.name}.part")
        try:
            private_folder(self.folder)  # it holds layer maps and what clients keep between rounds
            shutil.rmtree(part, ignore_errors=True)
            for name in names:
                _link(root / name, part / name)
            hashes = {name: file_sha256(part / name) for name in sorted(names)}
            write_sealed(part / "manifest.json", {"files": hashes, "facts": facts})
            shutil.rmtree(kept, ignore_errors=True)
            part.rename(kept)
        except OSError as error:
            raise CheckpointError(f"{kept} cannot be written: {error}; free disk space, then start again") from error


def key_of(stage: Stage, run: Run) -> str | None:
    """Return the hash of all that a stage depends on, told by content: names and paths are nothing.

    Returns:
        None where something cannot be told by its content, or the stage's work is of this run alone.
    """
    if not stage.may_be_shared(run):
        return None
    target = _target_key(run) if "target" in stage.reads.sources else ""
    before = {earlier: key_of(earlier(), run) for earlier in stage.after}
    if target is None or None in before.values():
        return None
    tell: dict[str, Callable[[], Any]] = {
        "target": lambda: target,
        "tokenizer": lambda: ["the target's", run.facts.template],
        "calibration": lambda: [_texts(run, rows) for rows in stage.texts(run.config) if rows],
        "data": lambda: _rows(run),
        "plugins": lambda: plugins(run.config.plugins),
        "versions": lambda: _environment(run),
    }
    content = stage.inputs(run, lambda name: tell[name](), lambda earlier: before[type(earlier)])
    return _hash({**content, "classes": _classes(run.config, content["settings"])})


def _target_key(run: Run) -> str | None:
    if run.target_key is None:
        run.target_key = model_key(*run.target)
    return run.target_key


def _texts(run: Run, rows: int) -> list[str]:
    calibration = run.config.compression.calibration
    return public_texts(calibration, run.clients.owned, rows=rows, seed=run.config.seed)


def _rows(run: Run) -> list[Any]:
    """Return what tells the clients' rows, who owns which, and the questions that rounds are scored on."""
    asked = [[question.requests, question.gold] for question in run.questions]
    return [run.facts.data_sha256, file_sha256(run.folder.partition), asked]


def _classes(config: RunConfig, settings: Iterable[str]) -> dict[str, str]:
    """Return the class of every component among the settings: plugins may use one name for two classes."""
    groups = sorted({key.split(".")[0] for key in settings})
    found = {group: getattr(config, group) for group in groups}
    own: dict[str, Component] = {}
    if "parts" in found:
        own |= {f"parts.{name}": part for name, part in config.parts.items()}
    if "client" in found:
        own |= {"client.schedule": config.client.schedule, "client.optimizer": config.client.optimizer}
    components = {**found, **own}.items()
    return {
        name: f"{type(part).__module__}.{type(part).__qualname__}"
        for name, part in components
        if isinstance(part, Component)
    }


def evaluation_key(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> str | None:
    """Return the hash of all that a model's scores depend on.

    Args:
        run: The run.
        model: What is scored.
        tokenizer: Its tokenizer.
        settings: Of the evaluation, see :func:`fedproxy.pipeline.evaluation.evaluation_settings`; the count of rounds
            in it is not looked at, the weights tell.

    Returns:
        None where model or questions cannot be told by their content: a model class that is not transformers' own, or
        a task that comes through the hub.
    """
    scored = model_key(model, tokenizer)
    questions = questions_sha256(settings["tasks"], settings["num_fewshot"])
    if scored is None or questions is None:
        return None
    return _hash(
        {
            "model": scored,
            "questions": questions,
            "settings": {name: value for name, value in settings.items() if name != "rounds"},
            "batch_tokens": run.config.evaluation.batch_tokens,
            "environment": _environment(run),
        }
    )


def model_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the hash of a model's weights, configurations and tokenizer; None for classes of unknown code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not type(model).__module__.startswith("transformers.") or backend is None:
        return None
    configs = [
        {name: value for name, value in config.to_dict().items() if name not in _PLACES}
        for config in (model.config, model.generation_config)
        if config is not None
    ]
    switches = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool)}
    return _hash(
        {
            "class": type(model).__qualname__,
            "weights": state_sha256(model),
            "configs": json.loads(json.dumps(configs, default=str)),
            "tokenizer": [type(tokenizer).__qualname__, _stateless(backend.to_str()), switches, tokenizer.padding_side],
            "chat_template": tokenizer.chat_template,
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        }
    )


def _stateless(backend: str) -> dict[str, Any]:
    """Return a fast tokenizer's JSON without what its last call left in it; every call sets that anew."""
    content: dict[str, Any] = json.loads(backend)
    return {name: value for name, value in content.items() if name not in ("truncation", "padding")}


def questions_sha256(tasks: Sequence[str], num_fewshot: int) -> str | None:
    """Return the hash of the tasks' templates and data files; None if one of them is not a local task."""
    digest = hashlib.sha256()
    for name in tasks:
        task, splits = offline_tasks().get(name), needed_splits(name, None, num_fewshot)
        if task is None or not task.has(splits):
            return None
        digest.update(f"{name}\x00{task.text}\x00".encode())
        for split in splits:
            path = task.file(split)
            assert path is not None  # has() looked
            digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256, or an empty text where it cannot be read."""
    try:
        return files.file_sha256(path)
    except OSError:
        return ""


def _whole(path: Path) -> dict[str, Any] | None:
    """Return what is kept in a file, or None where there is none or it is damaged: then it is made again."""
    try:
        return read_sealed(path)
    except CheckpointError:
        return None


@cache
def sources_sha256() -> str:
    """Return the hash of FedProxy's own source files: other code may do other work."""
    root = Path(fedproxy.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("tasks/*.yaml")]):
        digest.update(f"{path.relative_to(root)}\x00".encode() + path.read_bytes())
    return digest.hexdigest()


def _environment(run: Run) -> dict[str, Any]:
    return {
        "versions": versions(),
        "sources": sources_sha256(),
        "plugins": plugins(run.config.plugins),
        "device": str(run.device),
        "machine": [platform.machine(), hardware()["cpu"], hardware().get("gpus")],
        "threads": torch.get_num_threads(),
    }


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()[:32]


def _files(root: Path, names: Iterable[str]) -> set[str]:
    """Return the path from ``root`` of every file that is one of these, or lies below one."""
    tops = [root / name for name in names]
    inside = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
    return {path.relative_to(root).as_posix() for path in inside if path.is_file()}


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; it is copied where lines are added to it, or the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix != ".jsonl":
        with suppress(OSError):
            os.link(source, target)
            return
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)

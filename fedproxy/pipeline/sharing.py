"""Work that several runs have in common, kept under the hash of all that it was made from.

Two runs share a proxy, a federation or an evaluation only where everything that could change a bit of it agrees:
weights, configuration, texts, rows, questions, versions, our own sources, device and threads. Names and paths of runs
and models are never compared.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fedproxy
from fedproxy import files
from fedproxy.config import to_dict
from fedproxy.errors import CheckpointError
from fedproxy.evaluation.offline_tasks import offline_tasks
from fedproxy.evaluation.results import EvaluationResult
from fedproxy.evaluation.task_loading import needed_splits
from fedproxy.evaluation.validation import Question
from fedproxy.files import plain, private_folder
from fedproxy.models import state_sha256
from fedproxy.pipeline.data import public_texts
from fedproxy.reporting.provenance import hardware, versions
from fedproxy.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from fedproxy.pipeline.stages import Run

T = TypeVar("T")
_UNSHARED_FILES = {"server/facts.json"}
_FEDERATION_FILES = ("checkpoints/", "rounds.jsonl")
_NOT_OF_ROUNDS = (
    *("recipe", "method", "output_dir", "resume", "overwrite", "plugins", "loggers", "target"),
    *("compression", "healing", "distillation", "fusion", "evaluation"),
)
"""Settings on which the rounds do not depend, or through the proxy alone; plugins count by their files."""
_KEPT = re.compile(r"[0-9a-f]{32}(?:\.part)?")
"""What a folder of kept work is called: its key."""
_PLACES = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of a model's configuration that say where it came from, and nothing about what it computes."""


@dataclass(frozen=True)
class SharedWork:
    """A folder of proxies, federations and evaluations, each under its key.

    Args:
        folder: Where they lie; made when first needed.
    """

    folder: Path

    def compress(self, run: "Run", owned: Container[str], stage: Callable[[], None]) -> None:
        """Do stage (i) of a run, or take over what an equal stage made.

        Args:
            run: The run; its folder ends up with the same files, and its facts with the same entries, either way.
            owned: Clients' texts, which the stage must not read.
            stage: Does the work: ``compress`` of :mod:`fedproxy.pipeline.stages`.
        """
        last = run.folder.layer_map  # its presence says that all is there
        key = None if last.is_file() else proxy_key(run, owned)
        kept = None if key is None else self.folder / "proxies" / key
        if kept is not None and self._take(kept, run, last=last.relative_to(run.folder.root).as_posix()):
            run.display.say("compressed: taken from an equal run")
            return
        before, facts = _files(run.folder.root), dict(run.facts)
        stage()
        if kept is not None:
            made = {name for name, stamp in _files(run.folder.root).items() if before.get(name) != stamp}
            learned = {name: value for name, value in run.facts.items() if facts.get(name) != value}
            self._keep(kept, run.folder.root, made - _UNSHARED_FILES, learned)

    def federate(self, run: "Run", owned: Container[str], questions: Sequence[Question], stage: Callable[[], T]) -> T:
        """Do stage (ii) of a run, or take over the checkpoints and records of equal rounds.

        Runs that differ in fusion or evaluation alone train once.

        Args:
            run: The run, with its proxy.
            owned: Clients' texts, which no server stage must read.
            questions: What rounds are scored on.
            stage: Does the rounds that are left, of which there are none after equal ones were taken over:
                ``federate`` of :mod:`fedproxy.pipeline.stages`.

        Returns:
            What the stage returns.
        """
        mixed = not run.config.federation.rounds or run.facts.get("changes")  # rounds on inputs that changed in between
        key = None if mixed else federation_key(run, owned, questions)
        if key is None:
            return stage()
        kept = self.folder / "federations" / key
        begun = run.folder.checkpoints.is_dir() and any(run.folder.checkpoints.iterdir())
        if not begun and self._take(kept, run, last="checkpoints"):
            run.display.say("federated: taken from an equal run")
            return stage()
        result = stage()
        made = {name for name in _files(run.folder.root) if name.startswith(_FEDERATION_FILES)}
        self._keep(kept, run.folder.root, made, {})
        return result

    def clear(self) -> None:
        """Delete what is large, the proxies and federations; evaluations stay, and whatever else lies there."""
        for name in ("proxies", "federations"):
            for kept in (self.folder / name).glob("*"):
                if _KEPT.fullmatch(kept.name) and not kept.is_symlink():
                    shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):
                (self.folder / name).rmdir()

    def evaluate(self, key: str | None, score: Callable[[], EvaluationResult]) -> EvaluationResult:
        """Return the evaluation of that key, scored now if nobody did; ``seconds`` is what scoring took then."""
        if key is None:
            return score()
        path = self.folder / "evaluations" / f"{key}.json"
        kept = _whole(path)
        if kept is not None:
            return EvaluationResult(**kept)
        result = score()
        write_sealed(path, dataclasses.asdict(result))
        return result

    def _take(self, kept: Path, run: "Run", *, last: str) -> bool:
        """Link kept files into the run's folder; ``last``, a file or a folder, appears whole and after all others.

        Returns:
            False where nothing is kept, or a file was changed.
        """
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


def proxy_key(run: "Run", owned: Container[str]) -> str | None:
    """Return the hash of all that stage (i) depends on, or None where the target cannot be told by its content."""
    config = run.config
    target = model_key(*run.target())
    if target is None:
        return None
    calibration, distillation = config.compression.calibration, config.distillation
    wanted = [calibration.rows, *filter(None, [config.healing.rows, distillation.steps and distillation.rows])]
    return _hash(
        {
            "target": target,
            "dtype": config.target.dtype,
            "compression": _named(config.compression),
            "healing": to_dict(config.healing),
            "distillation": [to_dict(distillation), config.trainer] if distillation.steps else None,
            "texts": [public_texts(calibration, owned, rows=rows, seed=config.seed) for rows in wanted],
            "seed": config.seed,
            "environment": _environment(run),
        }
    )


def federation_key(run: "Run", owned: Container[str], questions: Sequence[Question]) -> str | None:
    """Return the hash of all that the rounds and their scores depend on.

    Returns:
        None where the proxy cannot be told by its content, or the best of several rounds is picked by scores.
    """
    config, proxy = run.config, proxy_key(run, owned)
    validation = config.federation.validation
    if proxy is None or validation.select == "best":
        return None
    aligned, _ = config.realignment.reads
    calibration = config.compression.calibration
    return _hash(
        {
            "proxy": proxy,
            "settings": {name: value for name, value in to_dict(config).items() if name not in _NOT_OF_ROUNDS},
            "classes": [_class(part) for part in (config.trainable, config.regularizer, config.aggregator)],
            "server_classes": [_class(part) for part in (config.server_optimizer, config.realignment, config.engine)],
            "rows": run.facts["data_sha256"],
            "owners": file_sha256(run.folder.partition) if run.folder.partition.exists() else "",
            "questions": [[question.requests, question.gold] for question in questions],
            "fusion": _named(config.fusion) if questions and validation.model == "fused" else None,
            "texts": public_texts(calibration, owned, rows=aligned, seed=config.seed) if aligned else [],
        }
    )


def evaluation_key(
    run: "Run", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
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
    """Return the hash of a model's weights, configuration and tokenizer; None for classes whose code we do not know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not type(model).__module__.startswith("transformers.") or backend is None:
        return None
    config = {name: value for name, value in model.config.to_dict().items() if name not in _PLACES}
    switches = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool)}
    return _hash(
        {
            "class": type(model).__qualname__,
            "weights": state_sha256(model),
            "config": json.loads(json.dumps(config, default=str)),
            "tokenizer": [type(tokenizer).__qualname__, _stateless(backend.to_str()), switches, tokenizer.padding_side],
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


def _environment(run: "Run") -> dict[str, Any]:
    plugins = [str(getattr(sys.modules.get(name), "__file__", "") or "") for name in run.config.plugins]
    return {
        "versions": versions(),
        "sources": sources_sha256(),
        "plugins": [file_sha256(Path(path)) for path in plugins],
        "device": str(run.device),
        "machine": [platform.machine(), hardware()["cpu"], hardware().get("gpus")],
        "threads": torch.get_num_threads(),
    }


def _named(component: Any) -> dict[str, Any]:
    """Return a component's options and its class: plugins may use one name for two classes."""
    return {**to_dict(component), "class": _class(component)}


def _class(component: Any) -> str:
    return f"{type(component).__module__}.{type(component).__qualname__}"


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()[:32]


def _files(root: Path) -> dict[str, tuple[int, int]]:
    """Return every file below ``root`` with what changes when it is written anew."""
    found = {path.relative_to(root).as_posix(): path.stat() for path in root.rglob("*") if path.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


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

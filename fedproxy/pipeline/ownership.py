"""What in a folder is a run's own: the only things that are ever deleted, and only where a marker says that it is one.

A run marks the folder that it claims. Whatever a run does not make under that name (notes, a cache, a link) is foreign:
where there is such a thing, nothing is deleted.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import fedproxy
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.files import open_regular, parse_json, write_json
from fedproxy.locks import LOCK_FILE

MARKER = ".fedproxy-run.json"
"""File that says that a run made a folder."""
_VERSION = 1
_TOKENIZER = (
    r"tokenizer[\w.-]*|(?:special_tokens_map|added_tokens|\w*vocab|emoji)\.json|(?:\w*vocab|merges|dict)\.(?:txt|bpe)|"
    r"[\w.-]+\.(?:model|spm|tiktoken|codes)|chat_template\.\w+|additional_chat_templates/[\w.-]+"
)
_MODEL = (
    r"(?:(?:target|tuned|untuned)/)?(?:(?:generation_)?config\.json|model(?:-\d+-of-\d+)?\.safetensors|"
    rf"model\.safetensors\.index\.json|README\.md|files\.json|{_TOKENIZER})"
)
_FILES = re.compile(
    "|".join(
        (
            r"config\.yaml|rounds\.jsonl|partition\.json|report\.(?:json|md|html)|block_influence\.png",
            r"paired_with_[^/]+\.(?:json|md)",
            re.escape(MARKER),
            re.escape(LOCK_FILE),
            r"server/\w+\.json",
            rf"server/proxy_undistilled/{_MODEL}",
            r"rows/[^/]+\.jsonl",
            r"rows/\.signing_keys/(?:registered\.json|[^/]+\.(?:key|sums\.json|sums\.lock))",
            r"rows/\.privacy_ledger/(?:\.lock|[^/]+\.json|releases/[^/]+/round_\d+\.\w+)",
            rf"proxy/{_MODEL}",
            rf"fused/(?:[^/]+/)?{_MODEL}",
            r"adapter/(?:[^/]+/)?(?:adapter_config\.json|adapter_model\.safetensors|trained_weights\.safetensors)",
            r"checkpoints/(?:\.part_|round_)\d+/\w+\.(?:safetensors|json)",
            r"checkpoints/(?:(?:clients|states)/[^/]+|frozen_changes|base_changes)/round_\d+\.\w+",
            r"checkpoints/logs/[^/]+\.log",
            r"checkpoints/server_noise\.json",
            r"evaluation/(?:target|proxy|proxy_tuned|fused)(?:\.[^/]+)?\.(?:scores\.json|samples\.jsonl|json)",
            r"logs/(?:\w+\.json|mlflow\.db[\w-]*|csv/(?:metrics\.csv|hparams\.yaml))",
            r"logs/(?:trainer|tensorboard|mlruns|wandb)/.+",
            r"exchange/(?:tmp|ranks_)[^/]*/.+",
        )
    )
)
_UNFINISHED = re.compile(r"\.(.+)\.(?:[a-z0-9_]{8}|part|old)")
"""What a killed process leaves of a file or a folder, beside its place."""
_TAKEN = ".taken"
"""Where files of an equal run arrive."""
_FOLDERS = (*("server", "rows", "proxy", "fused", "adapter", "checkpoints", "evaluation", "logs", "exchange", _TAKEN),)
_LAST = (MARKER, LOCK_FILE)


def mark(root: Path) -> None:
    """Note in a folder that a run made it.

    Raises:
        CheckpointError: If it cannot be written.
    """
    made = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(root / MARKER, {"version": _VERSION, "made_by": f"fedproxy {fedproxy.__version__}", "made": made})


def is_marked(root: Path) -> bool:
    """Return whether a run made this folder."""
    with suppress(OSError, ValueError), open_regular(root / MARKER) as file:
        return isinstance(parse_json(file.read(4096), dict).get("version"), int)
    return False


def only_remains(root: Path) -> bool:
    """Return whether a folder holds nothing, or no more than a run leaves that was killed while it claimed it."""
    names = (os.fspath(path.relative_to(root)) for path in _things(root))
    return all(name in _LAST or _is_remains(name) for name in names)


def first_foreign(root: Path, parts: Sequence[str] = ("",)) -> Path | None:
    """Return the first thing in a run's folder that no run makes, or None.

    Args:
        root: The folder.
        parts: Paths inside it to look at; all of it by default.

    Raises:
        CheckpointError: If it cannot be looked at.
    """
    for part in parts:
        for path in _things(root, part):
            if not _is_own(path, root):
                return path
    return None


def check_removable(root: Path) -> None:
    """Refuse to delete what is not proved to be a run's, or is where people work.

    Raises:
        ConfigError: Naming the first thing that speaks against it.
    """
    place = root.resolve()
    for what, where in (("the working directory", Path.cwd), ("your home folder", Path.home)):
        if _of_a_person(where, place):
            raise ConfigError(f"output_dir {root} is or holds {what} and is never deleted; choose another output_dir")
    if root.is_symlink():
        raise ConfigError(
            f"output_dir {root} is a link to {root.readlink()}, and nothing is deleted through a link; name the folder "
            "itself, or choose another output_dir"
        )
    if not is_marked(root):
        raise ConfigError(
            f"output_dir {root} has no {MARKER}, so nothing proves that a run made it (runs of older versions have "
            "none); delete it by hand, or choose another output_dir"
        )
    foreign = first_foreign(root)
    if foreign is not None:
        raise ConfigError(
            f"output_dir {root} is not deleted: no run made {foreign}; move that away, or choose another output_dir"
        )


def _of_a_person(where: Callable[[], Path], place: Path) -> bool:
    with suppress(OSError, RuntimeError):  # a user without a home, a working directory that is gone
        return where().resolve().is_relative_to(place)
    return False


def check_parts(root: Path, parts: Sequence[str]) -> None:
    """Refuse to replace parts of a run's folder that hold something foreign.

    Raises:
        ConfigError: Naming the first such thing.
    """
    foreign = first_foreign(root, parts)
    if foreign is not None:
        raise ConfigError(f"{foreign} lies where the run puts its own files, and no run made it; move it away")


def remove_own(root: Path) -> None:
    """Delete what runs make in a folder, its lock excepted; anything else stays.

    The configuration goes first, so that no half-deleted run is gone on with, and the marker last.

    Raises:
        CheckpointError: If something cannot be deleted.
    """
    try:
        entries = sorted(root.iterdir(), key=lambda path: (path.name in _LAST, path.name != "config.yaml", path.name))
        for entry in entries:
            if entry.name != LOCK_FILE and not _foreign_below(entry, root):
                _delete(entry)
    except OSError as error:
        raise CheckpointError(f"output_dir {root} cannot be emptied ({error.strerror}); delete it by hand") from error


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _foreign_below(entry: Path, root: Path) -> bool:
    if entry.is_dir() and not entry.is_symlink():
        return first_foreign(root, (entry.name,)) is not None
    return not _is_own(entry, root)


def _things(root: Path, part: str = "") -> Iterator[Path]:
    """Yield all files, links, empty folders and the like below a part of a folder, sorted."""

    def fail(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); choose another output_dir")

    top = root / part
    if top.is_symlink() or (top.exists() and not top.is_dir()):
        yield top
        return
    for folder, folders, files in os.walk(top, onerror=fail if top.is_dir() else None):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in sorted([*files, *links]))
        if not folders and not files and Path(folder) != root:
            yield Path(folder)


def _is_own(path: Path, root: Path) -> bool:
    name = _finished(path.relative_to(root).as_posix())
    if path.is_symlink():
        return name.startswith("logs/wandb/")  # it links its latest run
    if path.is_dir():  # an empty one
        return _could_hold(name)
    return path.is_file() and _FILES.fullmatch(name) is not None


def _could_hold(folder: str) -> bool:
    """Return whether an empty folder is one of a run's."""
    return folder.split("/")[0] in _FOLDERS


def _is_remains(name: str) -> bool:
    """Return whether this is an empty folder of a run, or a half-written first file."""
    return name in _FOLDERS or (_finished(name) != name and _finished(name) in (*_LAST, "config.yaml"))


def _finished(name: str) -> str:
    """Return a path as it is called when its parts are written whole."""
    parts = name.removeprefix(f"{_TAKEN}/").split("/")
    return "/".join(match[1] if (match := _UNFINISHED.fullmatch(part)) else part for part in parts)

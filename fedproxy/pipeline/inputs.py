"""What a run is made from, beside its configuration: noted when it begins, compared whenever it goes on.

Rounds, proxy and scores of one run belong to one target, one tokenizer, the same rows and public texts, the same
plugins and the same versions. What differs is named; ``accept_changed`` goes on with it, and the report says so.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedproxy.data.assets import resolve
from fedproxy.data.rows import Row
from fedproxy.data.templates import BUILT_IN
from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import CheckpointFolder
from fedproxy.files import at_home, file_sha256
from fedproxy.models import state_sha256
from fedproxy.pipeline.context import Facts, Input, Run
from fedproxy.pipeline.data import rows_sha256
from fedproxy.reporting.provenance import versions
from fedproxy.sealed import content_sha256

Clients = Mapping[str, Sequence[Row] | int]
"""Clients' rows; of those that lie at real sites the numbers of rows, as their sites say."""
_WEIGHTS = (".safetensors", ".bin")
_TOKENIZER = (
    *("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template"),
    *("sentencepiece", "spiece"),
)
_PACKAGES = ("fedproxy", "torch", "transformers", "lightning", "peft")
"""Distributions on whose version the bits of a training step depend."""
_SHOWN = 12


class ChangedInputError(CheckpointError):
    """A run would go on with something else than it began with."""


def check_inputs(run: Run, clients: Clients) -> dict[str, Any]:
    """Compare what a run is made from with what it began with; nothing is written.

    Before there is a proxy nothing depends on it, and everything counts as new.

    Args:
        run: The run.
        clients: Every client's rows, as dealt out now.

    Returns:
        Facts to note: ``inputs``, ``data_sha256``, ``origin`` where nothing depends on it yet, and ``changes`` where
        some were accepted, now or before.

    Raises:
        ChangedInputError: Naming the input, what of it differs, and the way out.
    """
    now, total = inputs(run, clients), _all_rows(clients)
    facts: dict[str, Any] = {"inputs": now, "data_sha256": total}
    before = run.facts.inputs
    if not run.folder.layer_map.is_file() or not before:
        return {**facts, "origin": now}
    found = {name: said for name in now if (said := _difference(name, before.get(name, {}), now[name]))}
    if "target" in found and _same_weights(run, before["target"], now["target"]):
        del found["target"]
    after = (CheckpointFolder(run.folder.checkpoints).rounds() or [0])[-1]
    changes = [*run.facts.changes]
    for name, said in found.items():
        if name not in run.config.accept_changed:
            raise ChangedInputError(
                f"resume=auto: {name} changed since the run in {run.folder.root} began: {said}; put it back, go on "
                f"with it by accept_changed=[{name}], which the report then says, or choose another output_dir"
            )
        hashes = (run.facts.data_sha256, total) if name == "data" else (_sha(before, name), _sha(now, name))
        changes.append({"input": name, "after_round": after, "what": said, "before": hashes[0], "now": hashes[1]})
        run.display.say(f"{name} changed after round {after}, which accept_changed allows: {said}")
    return {**facts, "changes": changes} if changes else facts


def same_rows(run: Run, facts: Mapping[str, Any]) -> bool:
    """Return whether the rows are those that the run knows, so that clients must own the same as before."""
    return run.facts.data_sha256 in (None, facts["data_sha256"])


def inputs(run: Run, clients: Clients) -> dict[str, Input]:
    """Return what the run is made from, as it is now."""
    config = run.config
    target = resolve(config.target.path)
    inside = [] if target is None else sorted(target.iterdir())
    files = {path.name: path for path in inside if path.is_file() and not path.name.startswith(".")}
    own = {name: path for name, path in files.items() if name.startswith(_TOKENIZER) or name.endswith(".model")}
    rest = {name: path for name, path in files.items() if name not in own and name.endswith((".json", *_WEIGHTS))}
    return {
        "target": {name: _stamp(path) if name.endswith(_WEIGHTS) else _hash(path) for name, path in rest.items()},
        "tokenizer": {name: _hash(path) for name, path in own.items()} | _template(config.data.template),
        "data": _sources(clients),
        "calibration": _texts(config.compression.calibration.path),
        "plugins": plugins(config.plugins),
        "versions": {name: version for name, version in versions().items() if name in _PACKAGES},
    }


def plugins(names: Iterable[str]) -> Input:
    """Return the hash of every plugin's own code."""
    return {module: _module(module) for module in names}


def change_notes(facts: Facts) -> list[str]:
    """Return a sentence on every input that changed and was accepted."""
    return [
        f"{change['input']} changed after round {change['after_round']}, accepted by accept_changed: {change['what']} "
        f"(SHA-256 {change['before']} before, {change['now']} from then on)."
        for change in facts.changes
    ]


def data_sha256(facts: Facts) -> str | dict[str, str] | None:
    """Return the hash of the clients' rows, or one for each part of the run where they changed."""
    changes = [change for change in facts.changes if change["input"] == "data"]
    if not changes:
        return facts.data_sha256
    parts = {f"until round {change['after_round']}": change["before"] for change in changes}
    return {**parts, f"from round {changes[-1]['after_round'] + 1}": facts.data_sha256 or ""}


def _difference(name: str, before: Input, now: Input) -> str:
    """Return in words what differs in an input, and nothing where nothing does."""
    if name == "plugins":  # the list of them may change, their code may not
        before, now = ({key: part[key] for key in before.keys() & now.keys()} for part in (before, now))
    if name == "data" and not before:  # of a run at sites by an older version
        return ""
    if name == "calibration" and not now:  # deleted: what was made from it is there
        return ""
    said = [
        f"{key} had {_shown(before.get(key))} and has {_shown(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return "; ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


def _same_weights(run: Run, before: Input, now: Input) -> bool:
    """Return whether the target is the same for all that its stamps say; what is not can never be accepted.

    Raises:
        ChangedInputError: If its weights are others than those that the proxy was made from.
    """
    if state_sha256(run.target[0]) != run.facts.target_sha256:
        raise ChangedInputError(
            f"resume=auto: the weights of target.path={run.config.target.path} are others than those that the proxy in "
            f"{run.folder.root} was made from ({_difference('target', before, now)}); put the target back, or choose "
            "another output_dir"
        )
    plain = [{name: part for name, part in side.items() if isinstance(part, str)} for side in (before, now)]
    return plain[0] == plain[1]


def _sources(clients: Clients) -> Input:
    rows: dict[str, list[Row]] = {}
    for row in (row for own in clients.values() if not isinstance(own, int) for row in own):
        rows.setdefault(row.source, []).append(row)
    found = {name: {"rows": len(rows[name]), "sha256": rows_sha256({name: rows[name]})} for name in sorted(rows)}
    elsewhere = {name: {"rows": own, "sha256": ""} for name, own in sorted(clients.items()) if isinstance(own, int)}
    return found | elsewhere  # sites compare rows themselves


def _all_rows(clients: Clients) -> str:
    numbers = {name: own for name, own in clients.items() if isinstance(own, int)}
    here = {name: own for name, own in clients.items() if not isinstance(own, int)}
    return content_sha256(numbers) if numbers else rows_sha256(here)


def _template(choice: str) -> Input:
    return {} if choice in BUILT_IN else {"data.template": _hash(at_home(choice))}


def _texts(path: str) -> Input:
    local = resolve(path)
    if local is None:
        return {}
    if local.is_dir():
        return {part.relative_to(local).as_posix(): _hash(part) for part in _visible(local.rglob("*"))}
    return {local.name: _hash(local)}


def _module(name: str) -> str:
    origin = getattr(sys.modules.get(name), "__file__", None)
    if origin is None:
        return ""
    path = Path(origin)
    parts = _visible(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return content_sha256({part.relative_to(path.parent).as_posix(): _hash(part) for part in parts})


def _visible(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""


def _stamp(path: Path) -> list[int]:
    """Return what changes when a large file is written again; where it differs, the weights themselves are compared."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _sha(found: Mapping[str, Input], name: str) -> str:
    return content_sha256(found.get(name, {}))


def _shown(part: Any) -> str:
    if isinstance(part, Mapping):
        return f"{part['rows']} rows" + (f" (SHA-256 {part['sha256'][:_SHOWN]})" if part["sha256"] else "")
    if isinstance(part, list):
        return f"{part[0]} bytes"
    if not part:
        return "nothing"
    return f"SHA-256 {part[:_SHOWN]}" if len(part) == 64 else str(part)

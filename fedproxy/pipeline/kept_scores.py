"""Scores that other runs took, kept by the hash of all that they depend on: equal questions are asked once.

They lie in ``$FEDPROXY_CACHE/scores``, or in the folder of one comparison, and hold what a run's folder holds too:
scores, and figures per question. The folder is closed to all but its owner. Scores of rows that clients hold out stay
in their run, or in its comparison.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.data.assets import cache_root
from fedproxy.errors import CheckpointError, ConfigError, one_line
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.evaluation.results import EvaluationResult, merged
from fedproxy.files import private_folder
from fedproxy.models import placed
from fedproxy.pipeline.asked import HELD_OUT, asking
from fedproxy.pipeline.context import Run
from fedproxy.pipeline.reuse import SharedWork, evaluation_key
from fedproxy.sealed import content_sha256, read_sealed, write_sealed

_BOUND = "FEDPROXY_SCORES_MIB"
_DEFAULT_MIB = 256.0
_ENTRY = re.compile(r"[0-9a-f]{64}\.json")
_PART = re.compile(r"\.[0-9a-f]{64}\..+")
_STALE_S = 3600.0
"""Age in seconds after which a half-written file is taken for one of a killed run."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class KeptScores:
    """A folder of evaluations, each of one evaluator and one model, under the hash of all that it depends on.

    An entry is used where its content has the hash that it was written with and says that it is of that key. Nothing
    that fails here ends a run: what cannot be read is scored, and what cannot be written is not kept; a line says so.

    Args:
        folder: Where they lie; made when first needed.
        max_bytes: Largest size of all entries; those that were not used for longest go first.
        of_study: Whether they belong to one comparison, whose runs share also what their clients hold out.
    """

    folder: Path
    max_bytes: float = math.inf
    of_study: bool = False

    def read(self, key: str, say: Say) -> tuple[EvaluationResult, str] | None:
        """Return an evaluation and when it was made, ISO 8601; None where there is no whole one."""
        path = self.folder / f"{key}.json"
        try:
            if not self.folder.is_dir():
                return None
            private_folder(self.folder)  # what others could write is not believed
            kept = read_sealed(path, remedy="it is not used")
            if kept is None:
                return None
            if kept["key"] != key:
                say(f"kept scores: {path} holds other scores; it is not used")
                return None
            found = EvaluationResult(**kept["result"]), str(kept["scored"])
            with suppress(OSError):
                os.utime(path)  # the last use, by which entries go
        except CheckpointError as error:
            say(f"kept scores: {error}")
        except (KeyError, TypeError):
            say(f"kept scores: {path} is of another version; it is not used")
        except OSError as error:
            say(f"kept scores: {self.folder} cannot be used ({error.strerror or one_line(error)})")
        else:
            return found
        return None

    def write(self, key: str, result: EvaluationResult, say: Say) -> None:
        """Keep an evaluation, and let go of the oldest ones where there are too many."""
        content = {
            "key": key,
            "scored": datetime.now(UTC).isoformat(timespec="seconds"),
            "result": dataclasses.asdict(result),
        }
        try:
            private_folder(self.folder)
            write_sealed(self.folder / f"{key}.json", content, private=True)
            self._keep_within_bounds()
        except (OSError, CheckpointError) as error:
            cause = error.__cause__ or error
            reason = getattr(cause, "strerror", None) or one_line(cause)
            say(f"scores are not kept for other runs: {self.folder} cannot be written ({reason})")

    def _keep_within_bounds(self) -> None:
        entries = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process may delete as well
                facts = path.stat()
                if _ENTRY.fullmatch(path.name):
                    entries.append((facts.st_mtime_ns, facts.st_size, path))
                elif _PART.fullmatch(path.name) and time.time() - facts.st_mtime > _STALE_S:
                    path.unlink()
        taken = 0
        for _, size, path in sorted(entries, reverse=True):
            taken += size
            if taken > self.max_bytes:
                path.unlink(missing_ok=True)


def kept_scores(shared: SharedWork | None) -> KeptScores | None:
    """Return the scores that a run may take over and leaves to others: a comparison's own, or the user's.

    Raises:
        ConfigError: If ``FEDPROXY_SCORES_MIB`` is not a size; 0 is none at all.
    """
    if shared is not None:
        return KeptScores(shared.folder / "evaluations", of_study=True)
    given = os.environ.get(_BOUND, "")
    try:
        most = float(given or _DEFAULT_MIB)
    except ValueError:
        most = -1.0
    if not most >= 0:
        raise ConfigError(f"{_BOUND} must be a number of MiB of at least 0, got {one_line(given, 40)}; unset it")
    return KeptScores(cache_root() / "scores", most * 2**20) if most else None


def ask(
    run: Run,
    words: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    settings: Mapping[str, Any],
    kept: KeptScores | None,
) -> tuple[EvaluationResult, str | None]:
    """Ask a model what is not known yet, and keep it.

    Args:
        run: The run.
        words: How the model is called.
        model: The model.
        tokenizer: Its tokenizer.
        asked: What it is asked.
        settings: Of the evaluation, see :func:`fedproxy.pipeline.evaluation.evaluation_settings`.
        kept: Scores of other runs.

    Returns:
        The result (``seconds`` is what scoring took, whenever that was), and which of it was taken over, in words.
    """
    members, say = asking(run.config, asked), run.display.say
    keys = {} if kept is None else _keys(run, model, tokenizer, asked, settings, members, kept)
    found = {name: kept.read(key, say) for name, key in keys.items()} if kept is not None else {}
    taken = {name: entry for name, entry in found.items() if entry is not None}
    results = {name: result for name, (result, _) in taken.items()}
    if len(results) < len(members):
        with run.display.counter(f"evaluating {words}") as advance, placed(model, run.device):
            for name, member in members.items():
                if name not in results:
                    results[name] = member.score(model, tokenizer, asked, progress=advance)
                    if kept is not None and name in keys:
                        kept.write(keys[name], results[name], say)
    names = [f"{name} of {when}" for name, (_, when) in taken.items()]
    return merged([results[name] for name in members]), ", ".join(names) or None


def _keys(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    settings: Mapping[str, Any],
    members: Mapping[str, Evaluator],
    kept: KeptScores,
) -> dict[str, str]:
    """Return the hash of all that an evaluator's result depends on, for those whose result may be kept."""
    prints = settings["asked"]
    known = [name for name in members if prints[name] is not None]
    if not kept.of_study and any(source.startswith(HELD_OUT) for source in asked.rows):
        known = [name for name in known if set(members[name].sources(asked)) <= set(asked.tasks)]
    common = {name: value for name, value in settings.items() if name not in ("asked", "evaluators")}
    key = evaluation_key(run, model, tokenizer, common) if known else None
    if key is None:
        return {}
    own = settings["evaluators"]
    return {
        name: content_sha256({"all": key, "evaluator": name, "options": own[name], "asked": prints[name]})
        for name in known
    }

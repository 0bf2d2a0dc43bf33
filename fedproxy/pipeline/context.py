"""What the stages of one run share: its recipe, its folder, what is known of it, and models that are loaded once."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import CheckpointFolder
from fedproxy.models import LayerMap, load_model, load_tokenizer
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.inputs import run_key
from fedproxy.pipeline.loggers import RunLoggers
from fedproxy.sealed import RESTART, check_tree, read_sealed, tree_sha256, without_tree, write_sealed

if TYPE_CHECKING:
    from fedproxy.pipeline.reuse import SharedWork

LAYER_MAP = "server/layer_map.json"
UNDISTILLED = "server/proxy_undistilled"
"""Paths in a run's folder, by which hashes are noted."""


@dataclass
class Run:
    """What the stages of one run share."""

    config: RunConfig
    folder: RunFolder
    display: Display
    shared: "SharedWork | None" = None
    """Work of other runs that this one may take over; None does everything itself."""

    def __post_init__(self) -> None:
        self._target: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self.loggers = RunLoggers(self.config.loggers, self.folder.root, to_dict(self.config))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is known for the report; read when first asked for, which is after an older run was deleted."""
        return read_sealed(self._facts_file) or self._first_facts()

    @property
    def _facts_file(self) -> Path:
        return self.folder.server / "facts.json"

    def note(self, **facts: Any) -> None:
        """Keep facts for the report, on disk, so that a continued run knows them too."""
        self.facts.update(facts)
        write_sealed(self._facts_file, self.facts)

    def warn(self, line: str) -> None:
        """Show a line and keep it for the report's notes."""
        self.display.say(line)
        self.note(warnings=[*self.facts.get("warnings", []), line])

    def keep(self, *names: str) -> None:
        """Note the hashes of all files below these files and folders of the run, as they are now."""
        others = without_tree(self.facts.get("files", {}), *names)
        self.note(files={**others, **tree_sha256(self.folder.root, *names)})

    def verify(self, *names: str) -> None:
        """Compare these files and folders of the run with what :meth:`keep` noted.

        Raises:
            CheckpointError: Naming the first file that differs.
        """
        check_tree(self.folder.root, self.facts.get("files", {}), *names)

    def layer_map(self) -> LayerMap:
        """Return the layer map, as it was written.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        self.verify(LAYER_MAP)
        return LayerMap.load(self.folder.layer_map)

    def checkpoints(self) -> CheckpointFolder:
        """Return the run's checkpoints; it has a proxy."""
        return CheckpointFolder(self.folder.checkpoints, run=run_key(self))

    def _first_facts(self) -> dict[str, Any]:
        if self.folder.layer_map.exists() or CheckpointFolder(self.folder.checkpoints).rounds():
            raise CheckpointError(f"{self._facts_file} is missing, and with it what the run began with; {RESTART}")
        return {"seconds": {}, "started": datetime.now(UTC).isoformat(timespec="seconds")}

    def note_seconds(self, stage: str, seconds: float) -> None:
        """Keep a finished stage's wall time."""
        self.note(seconds={**self.facts["seconds"], stage: seconds})

    @property
    def device(self) -> torch.device:
        """Where forward passes outside of training run: on the accelerator, unless the trainer stays on the CPU."""
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None or self.config.trainer.get("accelerator") == "cpu" else found

    def target(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the target and its tokenizer, loaded when first asked for."""
        if self._target is None:
            path = resolve(self.config.target.path) or self.config.target.path
            self._target = load_model(path, dtype=self.config.target.dtype), load_tokenizer(path)
        return self._target

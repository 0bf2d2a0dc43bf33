"""What the stages of one run share: its recipe, its folder, what is known of it, and models that are loaded once."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedproxy.config import RunConfig, to_dict
from fedproxy.data.assets import resolve
from fedproxy.data.partition.rows import ClientRows
from fedproxy.errors import CheckpointError
from fedproxy.evaluation.evaluators.base import Asked
from fedproxy.evaluation.validation import Question
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.models import LayerMap, load_model, load_tokenizer, state_sha256
from fedproxy.models.mapped import release, trim
from fedproxy.pipeline.asked import asked_of
from fedproxy.pipeline.display import Display
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.loggers import RunLoggers
from fedproxy.pipeline.now import NowFile
from fedproxy.pipeline.tuned import TunedProxies
from fedproxy.reporting.run_report import RunReport
from fedproxy.sealed import RESTART, check_tree, read_sealed, tree_sha256, without_tree, write_sealed
from fedproxy.strategies.trainable.base import TrainableModel

LAYER_MAP = "server/layer_map.json"
UNDISTILLED = "server/proxy_undistilled"
"""Paths in a run's folder, by which hashes are noted."""
Input = dict[str, Any]
"""Parts of an input by name: a file, a source, a package; each with what tells it from another."""


@dataclass(frozen=True)
class Facts:
    """What a run knows of itself when it goes on, and tells in its report: ``server/facts.json``."""

    started: str
    """When it began, ISO 8601."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of finished stages."""
    stages: dict[str, str] = field(default_factory=dict)
    """Finished stages, each with the hash of its inputs."""
    files: dict[str, str] = field(default_factory=dict)
    """Hash of every file that a stage made and another one reads."""
    origin: dict[str, Input] = field(default_factory=dict)
    """What the run is made from, as it was when there was no proxy yet."""
    inputs: dict[str, Input] = field(default_factory=dict)
    """The same, with what was accepted since."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Inputs that changed and were accepted."""
    data_sha256: str | None = None
    lengths: dict[str, int | None] = field(default_factory=dict)
    """What became of the rows when they were tokenised."""
    examples: dict[str, int] = field(default_factory=dict)
    """Examples that each client trains on in an epoch; none where rows lie at real sites."""
    data_notes: list[str] = field(default_factory=list)
    """How the rows were read, in sentences."""
    template: str | None = None
    """Chat template that rows are rendered through, which travels with the proxy."""
    warnings: list[str] = field(default_factory=list)
    target_parameters: int | None = None
    proxy_parameters: int | None = None
    disclosed_parameters: int | None = None
    target_sha256: str | None = None
    block_scores: list[float] | None = None
    fidelity: dict[str, Any] | None = None
    trainable_parameters: int | None = None
    collected_bytes: int = 0
    """Bytes of clients' own tensors, handed in after the last round."""
    at_sites: dict[str, Any] | None = None
    """What models score on rows that clients at real sites hold back."""
    fused_after_round: int | None = None
    fusion: dict[str, Any] = field(default_factory=dict)
    """Options of fusion that were chosen on public text, by folder."""

    @classmethod
    def load(cls, path: Path) -> "Facts | None":
        """Read what :meth:`save` wrote; None where there is nothing.

        Raises:
            CheckpointError: If the file is damaged, or another version's.
        """
        content = read_sealed(path)
        if content is None:
            return None
        known = {item.name for item in fields(cls)}
        if "started" not in content or not content.keys() <= known:
            raise CheckpointError(f"{path} is of another version of FedProxy; finish the run with it, or {RESTART}")
        return cls(**content)

    def save(self, path: Path) -> None:
        """Write the file, with a hash of itself; what is as it was at the beginning is left out."""
        write_sealed(path, {item.name: getattr(self, item.name) for item in fields(self) if self._is_known(item)})

    def _is_known(self, item: Any) -> bool:
        start = item.default if item.default_factory is MISSING else item.default_factory()
        return bool(getattr(self, item.name) != start)


@dataclass
class Run:
    """What the stages of one run share."""

    config: RunConfig
    folder: RunFolder
    display: Display
    questions: Sequence[Question] = ()
    """Held-out rows to score the state on between rounds."""
    trained: tuple[TrainableModel, Progress] | None = None
    """After federation: the proxy with its trained parts, and the progress that it has."""
    tuned: TunedProxies | None = None
    """After fusion, or after compression where nothing is trained: the proxies to score."""
    scores: dict[str, Any] = field(default_factory=dict)
    """By model, as far as evaluation came."""
    report: RunReport | None = None
    target_key: str | None = None
    """Hash of the target's content, weights and tokenizer, where it was taken."""

    def __post_init__(self) -> None:
        """Open the run's loggers and its file of the present stage."""
        self.now = NowFile(self.folder.now)
        self.loggers = RunLoggers(self.config.loggers, self.folder.root, to_dict(self.config))
        self._facts: Facts | None = None
        self._clients: ClientRows | None = None
        self._is_compressed = False

    @property
    def clients(self) -> ClientRows:
        """The clients, with their numbers of rows; known once rows are dealt out."""
        assert self._clients is not None
        return self._clients

    @clients.setter
    def clients(self, clients: ClientRows) -> None:
        self._clients = clients

    @property
    def after_federation(self) -> tuple[TrainableModel, Progress]:
        """What federation left."""
        assert self.trained is not None
        return self.trained

    @property
    def finished(self) -> RunReport:
        """The report of a run that is done."""
        assert self.report is not None
        return self.report

    @property
    def facts(self) -> Facts:
        """What is known; read when first asked for, which is after an older run was deleted."""
        if self._facts is None:
            self._facts = Facts.load(self.folder.facts) or self._first_facts()
        return self._facts

    def _first_facts(self) -> Facts:
        if self.folder.layer_map.exists() or CheckpointFolder(self.folder.checkpoints).rounds():
            raise CheckpointError(f"{self.folder.facts} is missing, and with it what the run began with; {RESTART}")
        return Facts(started=datetime.now(UTC).isoformat(timespec="seconds"))

    def note(self, **facts: Any) -> None:
        """Keep facts, on disk, so that a continued run knows them too."""
        self._facts = replace(self.facts, **facts)
        self._facts.save(self.folder.facts)

    def note_seconds(self, stage: str, seconds: float) -> None:
        """Keep a finished stage's wall time."""
        self.note(seconds={**self.facts.seconds, stage: seconds})

    def warn(self, line: str) -> None:
        """Show a line and keep it for the report's notes."""
        self.display.say(line)
        self.note(warnings=[*self.facts.warnings, line])

    def hashes(self, *names: str) -> dict[str, str]:
        """Return the known hashes, with those of all files below these files and folders as they are now."""
        return {**without_tree(self.facts.files, *names), **tree_sha256(self.folder.root, *names)}

    def verify(self, *names: str) -> None:
        """Compare these files and folders of the run with the hashes that were noted.

        Raises:
            CheckpointError: Naming the first file that differs.
        """
        check_tree(self.folder.root, self.facts.files, *names)

    @cached_property
    def asked(self) -> Asked:
        """What the recipe asks of every model, clients' own held-out rows aside; files are read once in a run."""
        return asked_of(self.config)

    @cached_property
    def layer_map(self) -> LayerMap:
        """The layer map, as it was written; read once.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        self.verify(LAYER_MAP)
        return LayerMap.load(self.folder.layer_map)

    @property
    def device(self) -> torch.device:
        """Where forward passes outside of training run: on the accelerator, unless the trainer stays on the CPU."""
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None or self.config.trainer.get("accelerator") == "cpu" else found

    @property
    def target_path(self) -> str | Path:
        """Where the target lies."""
        return resolve(self.config.target.path) or self.config.target.path

    @cached_property
    def target(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The target and its tokenizer, loaded when first asked for."""
        return load_model(self.target_path, dtype=self.config.target.dtype), load_tokenizer(self.target_path)

    def let_go(self) -> None:
        """Free the target, which is loaded again where it is needed, and all memory that was used and is not needed."""
        self.__dict__.pop("target", None)
        release()
        trim()

    @property
    def fusible_target(self) -> PreTrainedModel:
        """The target, found to be the one that was compressed; its weights are hashed once in a run.

        Raises:
            ModelError: If it is another one.
        """
        if not self._is_compressed:
            self.layer_map.require_target(state_sha256(self.target[0]))
            self._is_compressed = True
        return self.target[0]

    def proxy(self) -> PreTrainedModel:
        """Return the proxy as clients receive it, loaded anew."""
        return load_model(self.folder.proxy, dtype=self.config.target.dtype)

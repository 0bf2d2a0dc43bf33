"""The record of one run: report.json of schema version 1, and the pages made from it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedproxy.errors import CheckpointError, nearest
from fedproxy.files import plain, read_json
from fedproxy.reporting.at_sites import SiteScores
from fedproxy.reporting.frame import framed
from fedproxy.reporting.privacy import PrivacyReport
from fedproxy.reporting.schema import SchemaError, decode
from fedproxy.reporting.scores import ACCURACIES, MODELS, value_of
from fedproxy.reporting.summary import summary

SCHEMA_VERSION = 1
PAGES = ("report.md", "report.html")
"""What people read beside report.json."""
Numbers = float | Mapping[str, float | None] | Sequence[float | None] | None
"""One number for the round, or one per client: by name, or in the order of ``clients``."""


@dataclass(frozen=True)
class RunInfo:
    """What was run and how it ended."""

    recipe: str
    method: str
    status: str
    """``completed`` or ``failed``."""
    seed: int
    started: str
    """Start of the run, UTC, ISO 8601."""
    seconds: float | None = None
    """Wall time of the whole run."""
    error: str | None = None
    """One line on why a failed run failed."""


@dataclass(frozen=True)
class Cost:
    """What the run took; parameters count tied tensors once, bytes are payload."""

    target_parameters: int | None = None
    proxy_parameters: int | None = None
    trainable_parameters: int | None = None
    upload_bytes: int | None = None
    """Clients to server, all rounds."""
    download_bytes: int | None = None
    """Server to clients, all rounds."""
    client_seconds: float | None = None
    """Local training, summed over clients and rounds."""
    server_seconds: float | None = None
    """Compression, distillation, aggregation and fusion."""
    evaluation_seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Exposure:
    """How much of the owner's model clients get to hold. Reduced exposure, not a guarantee."""

    disclosed_parameter_share: float | None = None
    """Parameters sent to clients over the target's, in [0, 1]."""
    proxy_gap: float | None = None
    """Mean score of target minus that of the proxy as clients receive it."""
    proxy_tuned_gap: float | None = None
    """Mean score of fused minus that of the tuned proxy, which is what clients hold at the end."""

    @classmethod
    def measure(cls, scores: Mapping[str, Mapping[str, Mapping[str, float | None]]], share: float) -> "Exposure":
        """Return the exposure of a run from its scores (``mean`` included) and the disclosed share of parameters."""

        def gap(owner: str, held: str) -> float | None:
            means = [scores.get(model, {}).get("mean") for model in (owner, held)]
            pairs = ([value_of(mean, metric) for mean in means] for metric in ACCURACIES)
            return next((high.value - low.value for high, low in pairs if high and low), None)

        return cls(share, gap("target", "proxy"), gap("fused", "proxy_tuned"))


@dataclass(frozen=True)
class RoundReport:
    """One federated round: one line of rounds.jsonl. Fields that the aggregation rule does not give are None."""

    round: int
    """Round number, from 1."""
    clients: Sequence[str] = ()
    """Client names, sorted; per-client lists and the cosine's rows are in this order."""
    train_loss: Numbers = None
    """Task loss, nats per answer token."""
    regularizer_loss: Numbers = None
    heterogeneity: Numbers = None
    """h_k of Eq (5), in [0, 1]."""
    weights: Numbers = None
    """w_k of Eq (6)."""
    retention: Numbers = None
    """r_k of Eq (10)."""
    conflict_mean: float | None = None
    """Mean over coordinates of C_p of Eq (7), in [0, 1]."""
    cosine: Sequence[Sequence[float | None]] | None = None
    """S_ij of Eq (5), clients x clients."""
    sign_agreement: Numbers = None
    kept_density: Numbers = None
    update_norms: Numbers = None
    factor_mean_error: float | None = None
    """Relative error of averaging A and B instead of B A."""
    upload_bytes: int | None = None
    download_bytes: int | None = None
    seconds: float | None = None
    validation: Mapping[str, Mapping[str, float | None]] | None = None
    """Source, and ``mean``, to metric to value, on held-out training rows; left out of rounds without."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Clients that were asked but are not in the result, each with the reason."""


@dataclass(frozen=True)
class Provenance:
    """What is needed to know what made the numbers."""

    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    target_sha256: str | None = None
    data_sha256: str | Mapping[str, str] | None = None
    hardware: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompressionReport:
    """Block Influence of the target's blocks and which of them the proxy keeps; the server's knowledge only."""

    scores: Sequence[float | None]
    """BI_i of Eq (4) per target block."""
    kept: Sequence[int]
    """Target indices of the kept blocks, from 0."""


@dataclass(frozen=True)
class FidelityReport:
    """How near the proxy is to the target on public text that neither compression nor distillation read."""

    tokens: int
    """Tokens predicted."""
    kl: float
    """KL(target || proxy), nats per token."""
    target_perplexity: float
    proxy_perplexity: float
    target_tokens_per_second: float
    """Forward passes on this run's hardware."""
    proxy_tokens_per_second: float


@dataclass(frozen=True)
class ValidationReport:
    """How rounds were scored on rows that no client owns and no final score uses."""

    model: str
    """``proxy`` or ``fused``."""
    metric: str
    """Mean score by which rounds are compared."""
    select: str
    """``last`` or ``best``."""
    questions: int
    fused_after_round: int | None = None
    """Round whose state was fused; None where the run did not come to it."""
    evaluator: str | None = None
    """Evaluator that scored rounds on what the final scores are of; None, and left out, for held-out training rows."""


@dataclass(frozen=True)
class RunReport:
    """Everything report.json holds, see docs/reports.md for the keys; a notebook shows report.html."""

    run: RunInfo
    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    """Model to task (and ``mean``) to metric to value."""
    cost: Cost = field(default_factory=Cost)
    exposure: Exposure = field(default_factory=Exposure)
    rounds: Sequence[RoundReport] = field(default=(), repr=False)
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    compression: CompressionReport | None = None
    """Optional; left out of report.json where None."""
    notes: Sequence[str] = ()
    """Sentences that belong next to the numbers, e.g. that the target is de-quantised; left out where empty."""
    client_scores: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | None]]]] = field(
        default_factory=dict, repr=False
    )
    """Where clients are never merged: client to ``scores`` of its own models, whose means ``scores`` has; left out
    where empty."""
    validation: ValidationReport | None = None
    """Optional; left out of report.json where None."""
    fidelity: FidelityReport | None = None
    """Optional; left out of report.json where None."""
    privacy: PrivacyReport | None = None
    """Optional; left out of report.json where None."""
    at_sites: SiteScores | None = None
    """Optional; left out of report.json where None."""
    path: Path | None = field(default=None, compare=False)
    """Folder that the report lies in, which report.json does not say; None where it lies nowhere."""

    def __str__(self) -> str:
        """Return each model's mean score, a line a model."""
        return summary(self)

    def _repr_html_(self) -> str | None:
        return framed(None if self.path is None else self.path / PAGES[1])

    def to_dict(self) -> dict[str, Any]:
        """Return report.json's content as plain JSON types; NaN and infinities are None."""
        kept = dataclasses.asdict(dataclasses.replace(self, path=None))
        del kept["path"]
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **plain(kept)}
        for key in ("compression", "fidelity", "notes", "client_scores", "validation", "privacy", "at_sites"):
            if not data[key]:
                del data[key]
        if data.get("validation") and not data["validation"]["evaluator"]:
            del data["validation"]["evaluator"]
        for line in data["rounds"]:
            for key in ("validation", "dropped"):
                if not line[key]:
                    del line[key]
        return data

    @classmethod
    def from_dict(cls, data: Any, source: str = "report.json") -> "RunReport":
        """Return the report that ``data`` (parsed JSON) describes.

        Raises:
            CheckpointError: If the schema is newer or broken; the line names ``source``, the key and the rule.
        """
        try:
            _check_version(data)
            for key in ("scores", "cost", "exposure", "rounds", "provenance"):
                if key not in data:
                    raise SchemaError(f"{key} is missing")
            report = decode(cls, {key: value for key, value in data.items() if key != "path"})
            _check_values(report)
        except SchemaError as error:
            raise CheckpointError(f"{source} is not a report of schema version {SCHEMA_VERSION}: {error}") from None
        return report

    @classmethod
    def load(cls, path: str | Path) -> "RunReport":
        """Read a report from a run folder or a report.json.

        Raises:
            CheckpointError: If there is none, or it is broken or of a newer schema.
        """
        file = report_file(path)
        if not os.path.lexists(file):
            raise CheckpointError(f"cannot read {file}: there is no such file; give the folder of a finished run")
        data = read_json(file, dict, remedy="run the recipe again with resume=auto to get a whole one")
        return dataclasses.replace(cls.from_dict(data, str(file)), path=file.parent)


def report_file(path: str | Path) -> Path:
    """Return the report.json that a run folder or a file path means."""
    path = Path(path)
    return path if path.suffix == ".json" and not path.is_dir() else path / "report.json"


def check_pages(folder: Path) -> None:
    """Refuse to write a report's pages over others in a folder that is not a run's.

    Raises:
        CheckpointError: Naming the page.
    """
    if (folder / "config.yaml").is_file() and (folder / "server").is_dir():
        return
    for page in (folder / name for name in PAGES):
        if os.path.lexists(page):
            raise CheckpointError(
                f"{page} is there, and {folder} is not the folder of a run, so something else may have written it; "
                "move it away"
            )


def _check_version(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise SchemaError("the report must be an object")
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise SchemaError(
            f"schema_version is {version}, made by a newer FedProxy; upgrade with pip install -U fedproxy"
        )
    if version != SCHEMA_VERSION:
        raise SchemaError(f"schema_version must be {SCHEMA_VERSION}, got {version!r}")


def _check_values(report: RunReport) -> None:
    if report.run.status not in ("completed", "failed"):
        raise SchemaError(f"run.status must be completed or failed, got {report.run.status!r}")
    for model in report.scores:
        if model not in MODELS:
            raise SchemaError(f"scores has an unknown model {model!r}{nearest(model, MODELS)}")
    blocks = report.compression
    if blocks is not None and blocks.scores and not set(blocks.kept) <= set(range(len(blocks.scores))):
        raise SchemaError(f"compression.kept must name blocks from 0 to {len(blocks.scores) - 1}, got {blocks.kept}")
    for index, line in enumerate(report.rounds):
        check_round(line, f"rounds[{index}].")


def check_round(line: RoundReport, where: str = "") -> None:
    """Refuse a round whose cosines are not one row per client.

    Raises:
        SchemaError: Naming the key behind ``where``.
    """
    size = len(line.clients)
    if line.cosine is not None and [len(row) for row in line.cosine] != [size] * size:
        raise SchemaError(f"{where}cosine must be {size} x {size}, one row per client")

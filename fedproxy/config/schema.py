"""RunConfig and its parts: frozen dataclasses, checked when they are made."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import fedproxy.data.partition.by_column  # noqa: F401 (registers a partition)
from fedproxy.data.formats import DataFormat
from fedproxy.data.partition import Partition
from fedproxy.errors import ConfigError, nearest
from fedproxy.evaluation.evaluators import Evaluator
from fedproxy.federation.engines import Engine
from fedproxy.modules.distillation_config import DistillationConfig
from fedproxy.modules.optimizers import Optimizer
from fedproxy.modules.schedules import Decaying, Schedule
from fedproxy.names import check_names, folded
from fedproxy.privacy.config import PrivacyConfig
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.compression import Compressor, HealingConfig
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.realignment import Realignment
from fedproxy.strategies.regularizers import Regularizer
from fedproxy.strategies.round_parts import RoundPart
from fedproxy.strategies.server_optimizers import ServerOptimizer
from fedproxy.strategies.trainable import Trainable

MODELS = ("target", "proxy", "proxy_tuned", "fused")
INPUTS = ("target", "tokenizer", "data", "calibration", "plugins", "versions")
LOGGERS = ("csv", "tensorboard", "mlflow", "wandb")
_MOST_COPIES = 1000
_WITH = {"privacy": "the node privacy; use privacy.unit=example or client"}
_SIZE = re.compile(r"0*[1-9]\d*[KMGT]B")


def _require(key: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def _require_different(key: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{key} names {twice[0]!r} twice; name each once")


@dataclass(frozen=True)
class TargetConfig:
    """The server's LLM."""

    path: str
    """``asset:NAME``, a ``from_pretrained`` folder or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of target, proxy and fused model; adapters and fusion compute in float32."""
    max_shard_size: str = "5GB"
    """Largest file of weights of proxy and fused model: ``500MB``, ``5GB``. A tensor is never divided."""

    def __post_init__(self) -> None:
        """Check the size; another text is a ConfigError."""
        ok, rule = _SIZE.fullmatch(self.max_shard_size), "a whole number from 1 and KB, MB, GB or TB, such as 5GB"
        _require("target.max_shard_size", self.max_shard_size, ok is not None, rule)


@dataclass(frozen=True)
class DataConfig:
    """The clients' rows."""

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks whose train split clients own; by default also those that are scored."""
    files: dict[str, str] = field(default_factory=dict)
    """Further sources, name to file, folder, pattern of either (``ward_*.jsonl``) or hub id."""
    format: DataFormat = field(default_factory=lambda: DataFormat.by_name("prompt_target")())
    formats: dict[str, str] = field(default_factory=dict)
    """Formats of single files, name to a format's name, which then has its default options: ``{ward: chat}``."""
    weights: dict[str, float] = field(default_factory=dict)
    """How many times the rows of single tasks or files stand in an epoch, 1 by default: 2 is twice, 0.5 a half of them,
    drawn by seed."""
    template: str = "auto"
    """Chat template that frames conversations: ``auto`` (the target's own, plain lines where it has none), ``chatml``,
    ``none`` (plain lines), or a file of Jinja text."""
    template_names_target: bool = False
    """Whether the chat template may go to clients although it holds the target's name."""
    holdout: int | float | None = None
    """Rows that nobody trains on, for their owner to score models on: a share of each source's rows (above 0, below 1)
    or a number of them; of each client's where a column names the clients. Null for none."""
    prompt_column: str = "prompt"
    """Column that the model is given, in files of the format prompt_target."""
    target_column: str = "target"
    """Column that it should answer, in files of the format prompt_target."""
    label_column: str | None = None
    """Column of data.files whose values ``partition: {name: dirichlet, by: label}`` skews; null for none."""
    rows_per_task: int | None = None
    """Rows sampled per source before the partition; null takes all."""
    max_input_tokens: int = 256
    """Longer prompts are cut from the left, so that the answer cue stays; the run says how many."""
    max_target_tokens: int = 64
    """Longer targets, end token included, are cut from the right; the run says how many. A conversation or a text has
    at most as many tokens as both together."""
    long_rows: Literal["cut", "split", "drop"] = "cut"
    """What becomes of rows that are longer: cut, or left out, or conversations and texts split into windows."""
    end_token: Literal["auto", "always", "never"] = "auto"
    """Whether targets end with the tokenizer's end-of-sequence token, so that a tuned model stops there: those of
    data.files alone (auto), all, or none. Conversations end as their template ends them, but for ``always``."""
    partition: Partition = field(default_factory=lambda: Partition.by_name("by_task")())

    def __post_init__(self) -> None:
        """Check sources, names, lengths and the hold-out against each other; what does not fit is a ConfigError."""
        own = self.partition.name == "sites"
        given = bool(self.tasks or self.files) or own
        _require("data.tasks", self.tasks, given, "non-empty unless data.files names a source")
        if own and self.files:
            raise ConfigError("data.files must be empty with data.partition.name=sites: the rows lie at the sites")
        if own and self.holdout is not None:
            raise ConfigError(
                "data.holdout must be null with data.partition.name=sites: each site's file says what it holds back"
            )
        check_names(self.files, "data.files")
        _require_different("data.tasks", self.tasks)
        both = sorted({folded(task) for task in self.tasks} & {folded(name) for name in self.files})
        _require("data.files", both, not both, "named differently from data.tasks")
        taken = sorted(name for name in self.files if folded(name) == "mean")
        _require("data.files", taken, not taken, "named otherwise: the mean over sources has this name")
        for key in ("max_input_tokens", "max_target_tokens"):
            _require(f"data.{key}", getattr(self, key), getattr(self, key) >= 1, "at least 1")
        rows = self.rows_per_task
        _require("data.rows_per_task", rows, rows is None or rows >= 1, "at least 1, or null for all")
        _require("data.template", self.template, bool(self.template.strip()), "auto, chatml, none or a file")
        out = self.holdout
        ok = out is None or 0 < out < 1 or (out >= 1 and out == int(out))
        _require("data.holdout", out, ok, "a share above 0 and below 1, a whole number of at least 1, or null")
        self._check_sources()

    def _check_sources(self) -> None:
        for name, form in self.formats.items():
            if name not in self.files:
                raise ConfigError(f"data.formats.{name}: data.files has no such source{nearest(name, self.files)}")
            if form not in DataFormat.names():
                raise ConfigError(f"data.formats.{name}: unknown format {form!r}{nearest(form, DataFormat.names())}")
        for name, weight in self.weights.items():
            if name not in (*self.tasks, *self.files):
                known = (*self.tasks, *self.files)
                raise ConfigError(f"data.weights.{name}: there is no such task or file{nearest(name, known)}")
            _require(f"data.weights.{name}", weight, 0 < weight <= _MOST_COPIES, f"above 0 and at most {_MOST_COPIES}")


@dataclass(frozen=True)
class ClientConfig:
    """Local training of one client in one round; the optimiser starts fresh in each."""

    lr: float = 5e-5
    """Learning rate; the highest one where the schedule changes it."""
    schedule: Schedule = field(default_factory=lambda: Schedule.by_name("constant")())
    optimizer: Optimizer = field(default_factory=lambda: Optimizer.by_name("adamw")())
    batch_size: int = 16
    """Rows per batch."""
    accumulate: int = 1
    """Batches per optimiser step."""
    epochs: int = 1
    """Passes over the client's rows per round."""
    max_steps: int | None = None
    """Most optimiser steps of a client per round; null makes all that epochs has."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; null does not clip."""
    packing: bool = False
    """Put rows of a batch side by side into few sequences, each row seeing itself alone: less padding, same steps."""
    gradient_checkpointing: bool = False
    """Run blocks again in the backward pass instead of keeping their activations: less memory, about a third slower."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Bits of the frozen proxy's linear layers on clients (bitsandbytes); the adapters keep theirs, and fusion is into
    the target as it is."""

    def __post_init__(self) -> None:
        """Check the ranges of the options; one out of range is a ConfigError."""
        _require("client.lr", self.lr, self.lr > 0, "positive")
        for key in ("batch_size", "accumulate", "epochs"):
            _require(f"client.{key}", getattr(self, key), getattr(self, key) >= 1, "at least 1")
        most = self.max_steps
        _require("client.max_steps", most, most is None or most >= 1, "at least 1, or null for no limit")
        if isinstance(self.schedule, Decaying):
            least = self.schedule.min_lr
            _require("client.schedule.min_lr", least, least <= self.lr, f"at most client.lr={self.lr:g}")
        _require("client.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        norm = self.max_grad_norm
        _require("client.max_grad_norm", norm, norm is None or norm > 0, "positive, or null")

    def rows_seen(self, rows: int) -> int:
        """Return how many rows, repeated ones counted again, a client of ``rows`` rows sees in a round, at most."""
        every = rows * self.epochs
        return every if self.max_steps is None else min(every, self.max_steps * self.batch_size * self.accumulate)


@dataclass(frozen=True)
class ValidationConfig:
    """Scores between rounds, on training rows that no client owns."""

    every: int = 0
    """Rounds from one validation to the next; 0 for none."""
    rows: int = 64
    """Held-out rows per task or file of data."""
    model: Literal["proxy", "fused"] = "proxy"
    """What is scored: the tuned proxy, or the target after fusion (slower, and nearer to what a run ends with)."""
    metric: Literal["answer_nll", "acc", "acc_norm"] = "answer_nll"
    """Mean over tasks by which rounds are compared; answer_nll moves where accuracy on few rows does not."""
    select: Literal["last", "best"] = "last"
    """Which round's state is fused and scored at the end."""
    evaluator: str | None = None
    """Evaluator of ``evaluation`` that scores rounds instead, on what it asks at the end: to look at, never to choose a
    round by. Null scores held-out training rows."""

    def __post_init__(self) -> None:
        """Check the ranges, and that ``select=best`` has scores of rounds to select by; else a ConfigError."""
        _require("federation.validation.every", self.every, self.every >= 0, "at least 0")
        _require("federation.validation.rows", self.rows, self.rows >= 1, "at least 1")
        ok = self.select == "last" or self.every > 0
        _require("federation.validation.every", self.every, ok, "at least 1 with select=best")
        ok = self.evaluator is None or self.select == "last"
        rule = "last where an evaluator scores rounds: it asks what the final scores are of"
        _require("federation.validation.select", self.select, ok, rule)


@dataclass(frozen=True)
class FederationConfig:
    """The round loop."""

    rounds: int = 10
    """Rounds; 0 fuses the untuned proxy."""
    clients_per_round: int | str = "all"
    """How many clients are drawn each round, or ``all``."""
    space: Literal["factors", "product"] = "factors"
    """What is merged: LoRA's A and B as they are, or the products s B A, exactly, re-factored to the same rank."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: Literal["uniform", "weighted"] = "uniform"
    """How clients_per_round are drawn: all alike, or in proportion to their rows (then merge with uniform weights)."""
    min_clients: int | None = None
    """Clients of a round that must send a usable update; others are dropped and named. Null asks for all of them."""
    round_timeout_s: float | None = None
    """Seconds that a round's clients have together, from when the first can run; late ones are dropped. Null waits for
    all."""
    max_norm_ratio: float | None = 1000.0
    """An update longer than this multiple of the round's median norm is dropped; null checks no length. Honest
    clients differ by about the ratio of their optimiser steps: the default stops broken ones, not clever ones."""

    def __post_init__(self) -> None:
        """Check counts of rounds and clients, and the limits of a round; what does not fit is a ConfigError."""
        _require("federation.rounds", self.rounds, self.rounds >= 0, "at least 0")
        n = self.clients_per_round
        _require(
            "federation.clients_per_round", n, n == "all" or (isinstance(n, int) and n >= 1), "'all' or at least 1"
        )
        every, rounds = self.validation.every, self.rounds
        ok = self.validation.select == "last" or not rounds or every <= rounds
        _require("federation.validation.every", every, ok, f"at most the {rounds} rounds with select=best")
        least, drawn = self.min_clients, n if isinstance(n, int) else None
        rule = "at least 1, or null for all" if drawn is None else f"1 to clients_per_round ({drawn}), or null for all"
        _require("federation.min_clients", least, least is None or 1 <= least <= (drawn or least), rule)
        seconds, ratio = self.round_timeout_s, self.max_norm_ratio
        _require("federation.round_timeout_s", seconds, seconds is None or seconds > 0, "positive, or null")
        _require("federation.max_norm_ratio", ratio, ratio is None or ratio > 1, "above 1, or null")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored at the end of a run: tasks of lm-eval, held-out rows, and what evaluators of one's own ask."""

    tasks: list[str] | None = None
    """lm-eval tasks; null takes data.tasks. An empty list asks none."""
    files: dict[str, str] = field(default_factory=dict)
    """Held-out rows that nobody trains on, name to file, folder or hub id, in the form of data.files."""
    models: list[str] = field(default_factory=lambda: list(MODELS))
    """Which models are scored: target, proxy, proxy_tuned, fused. An empty list scores nothing."""
    limit: int | None = None
    """Score the first ``limit`` documents of each task; null scores all."""
    num_fewshot: int = 0
    """Solved examples before each question, from the train split."""
    batch_tokens: int = 4096
    """Tokens per forward pass, padding included."""
    seed: int = 1234
    """Seed of the few-shot sampler."""
    include_path: str | None = None
    """Folder with task files of one's own (lm-eval's YAML); tasks may then be named as they name themselves."""
    apply_chat_template: bool = False
    """Ask tasks through the tokenizer's chat template, as instruct models are used."""
    fewshot_as_multiturn: bool = False
    """With it: each solved example is a user's and an assistant's turn."""
    system_instruction: str | None = None
    """What the system says before each question of a task."""
    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    """Options of evaluators, by name: ``evaluation.evaluators.own_data.max_new_tokens=32``. lm_eval (for tasks) and
    own_data (for held-out rows) are there without being named; another one is where it is."""

    def __post_init__(self) -> None:
        """Check names of models, tasks and files, and the ranges; what does not fit is a ConfigError."""
        for name in self.models:
            if name not in MODELS:
                raise ConfigError(f"evaluation.models: unknown model {name!r}{nearest(name, MODELS)}")
        _require_different("evaluation.models", self.models)
        _require_different("evaluation.tasks", self.tasks or [])
        _require("evaluation.limit", self.limit, self.limit is None or self.limit >= 1, "at least 1, or null for all")
        _require("evaluation.num_fewshot", self.num_fewshot, self.num_fewshot >= 0, "at least 0")
        _require("evaluation.batch_tokens", self.batch_tokens, self.batch_tokens >= 1, "at least 1")
        check_names(self.files, "evaluation.files")
        taken = sorted(name for name in self.files if folded(name) == "mean")
        _require("evaluation.files", taken, not taken, "named otherwise: the mean over sources has this name")
        ok = self.apply_chat_template or not self.fewshot_as_multiturn
        _require("evaluation.fewshot_as_multiturn", True, ok, "false unless evaluation.apply_chat_template is true")

    @property
    def members(self) -> dict[str, Evaluator]:
        """All evaluators that take part where they have something to ask, by name."""
        there = {name: Evaluator.by_name(name)() for name in Evaluator.names() if Evaluator.by_name(name).always}
        return {**there, **self.evaluators}


@dataclass(frozen=True)
class RunConfig:
    """One run: every method is a choice of components."""

    target: TargetConfig
    data: DataConfig
    recipe: str = "custom"
    """Name of the recipe that was read."""
    method: str = "custom"
    """A label for reports; nothing branches on it."""
    seed: int = 42
    """Seed of every random draw of the run, few-shot examples excepted."""
    output_dir: str = "runs/${recipe}"
    """Folder of the run."""
    resume: Literal["auto", "never"] = "never"
    """``auto`` goes on from the last whole checkpoint of output_dir."""
    accept_changed: list[str] = field(default_factory=list)
    """What a run that goes on may find changed: target (its configuration, never its weights), tokenizer, data,
    calibration, plugins (their code), versions (of FedProxy and its libraries). The report says so."""
    overwrite: bool = False
    """Delete the run that output_dir holds, after everything else was checked; on the command line alone."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import for the components they register."""
    compression: Compressor = field(default_factory=lambda: Compressor.by_name("block_influence")())
    healing: HealingConfig = field(default_factory=HealingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    trainable: Trainable = field(default_factory=lambda: Trainable.by_name("lora")())
    client: ClientConfig = field(default_factory=ClientConfig)
    regularizer: Regularizer = field(default_factory=lambda: Regularizer.by_name("none")())
    federation: FederationConfig = field(default_factory=FederationConfig)
    engine: Engine = field(default_factory=lambda: Engine.by_name("in_process")())
    aggregator: Aggregator = field(default_factory=lambda: Aggregator.by_name("fedavg")())
    server_optimizer: ServerOptimizer = field(default_factory=lambda: ServerOptimizer.by_name("none")())
    realignment: Realignment = field(default_factory=lambda: Realignment.by_name("none")())
    parts: dict[str, RoundPart] = field(default_factory=dict)
    """What else rides with a round, by the round part's name: ``parts.precision.up=int8``."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    fusion: Fusion = field(default_factory=lambda: Fusion.by_name("plug_in")())
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: dict[str, Any] = field(
        default_factory=lambda: {"accelerator": "auto", "devices": "auto", "precision": "32-true"}
    )
    """Options of lightning.Trainer, for clients and distillation alike; ``devices`` above 1 and ``strategy``
    (ddp, fsdp) are for clients alone, and ``devices: auto`` is one for each client. ``callbacks`` are classes of
    plugins or of Lightning, ``profiler`` may be one: ``[my_plugin.MyCallback]``."""
    loggers: list[str] = field(default_factory=list)
    """Where rounds and scores also go: csv, tensorboard, mlflow, wandb (offline)."""

    def __post_init__(self) -> None:
        """Check what names another node or a logger, and that no key stands against another; else a ConfigError."""
        for name in self.loggers:
            if name not in LOGGERS:
                raise ConfigError(f"loggers: unknown logger {name!r}{nearest(name, LOGGERS)}")
        for name in self.accept_changed:
            if name not in INPUTS:
                raise ConfigError(f"accept_changed: unknown input {name!r}{nearest(name, INPUTS)}")
        _require_different("loggers", self.loggers)
        _require("output_dir", self.output_dir, bool(self.output_dir.strip()), "a folder; . is this one")
        member, known = self.federation.validation.evaluator, self.evaluation.members
        if member is not None and member not in known:
            raise ConfigError(f"federation.validation.evaluator: unknown evaluator {member!r}{nearest(member, known)}")
        for name, part in self.parts.items():
            if not part.optional:
                raise ConfigError(f"parts.{name} comes with {_WITH.get(name, 'the rule that needs it; remove it')}")
        _require("resume", self.resume, not (self.resume == "auto" and self.overwrite), "never where overwrite=true")

    @property
    def evaluation_tasks(self) -> list[str]:
        """The tasks that models are asked."""
        return self.data.tasks if self.evaluation.tasks is None else self.evaluation.tasks

    @property
    def scored_tasks(self) -> list[str]:
        """The same, and none where no model is scored."""
        return self.evaluation_tasks if self.evaluation.models else []

    @property
    def asks(self) -> bool:
        """Whether a model is scored on anything."""
        own = any(not member.always for member in self.evaluation.members.values())
        rows = self.evaluation.files or self.data.holdout is not None
        return bool(self.evaluation.models and (self.evaluation_tasks or rows or own))

"""How faithful proxies are: each compressor on SmolLM2, with and without a short distillation; resumable.

    python -m benchmarks.fidelity_study                  # every row: about two hours on one core
    python -m benchmarks.fidelity_study --removed 15     # in parts; finished rows are not repeated
    python -m benchmarks.fidelity_study --table          # only write the tables from the results that are there

A row's result goes to docs/results/fidelity/<row>.json, the tables to docs/results/fidelity.md. KL and perplexity are
taken on 64 public texts that neither compression nor distillation read, accuracy (acc_norm) and answer NLL on the first
questions of four tasks, zero-shot. Every distillation sees the same texts in the same order, and the teacher's outputs
are kept between rows. Distillation, tuning and scoring multiply in bfloat16 (trainer.precision=bf16-mixed); KL and
perplexity are in float32. The last rows tune and fuse (recipe fedproxy_llama with 15 of 30 blocks removed).
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedproxy.config import load_config
from fedproxy.data.assets import fetch, resolve
from fedproxy.data.assets.store import cache_root
from fedproxy.data.sources import read_texts
from fedproxy.evaluation.harness import evaluate_model, missing_assets
from fedproxy.files import write_json, write_text
from fedproxy.models import Decoder, load_model, load_tokenizer
from fedproxy.models.decoder import parameter_count, positions_limit
from fedproxy.modules.distillation_config import DistillationConfig
from fedproxy.modules.fidelity import compare
from fedproxy.pipeline.data import text_batches
from fedproxy.pipeline.run import run
from fedproxy.seeding import generator
from fedproxy.strategies.compression import Compressor
from fedproxy.strategies.compression.distilling import distil

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SEED, CALIBRATION_ROWS, HELD_OUT_ROWS = 42, 64, 64
PRECISION = "bf16-mixed"
RULES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "block_influence": ("block_influence", {}),
    "iterative": ("block_influence", {"iterative": True}),
    "angular": ("angular", {}),
    "uniform": ("uniform", {}),
    **{f"random_{seed}": ("random", {"seed": seed}) for seed in range(3)},
    "cluster": ("cluster", {}),
    "ffn_width": ("ffn_width", {}),
    "ffn_width_activations": ("ffn_width", {"saliency": "activations"}),
}
FUSED = {
    "plain": ("distillation.steps=0",),
    "distilled_replace": ("fusion.mode=replace",),
    "distilled_delta": ("fusion.mode=delta",),
}


@dataclass
class Study:
    """What all rows share; loaded when first needed."""

    target_path: str
    calibration: str
    tasks: list[str]
    limit: int
    distillation: DistillationConfig
    folder: Path

    @cached_property
    def target(self) -> Any:
        """The model that is compressed."""
        return load_model(resolve(self.target_path))

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(resolve(self.target_path))

    @cached_property
    def texts(self) -> list[str]:
        """Public texts: calibration and distillation read the first ones, fidelity is measured on the last ones."""
        used = max(CALIBRATION_ROWS, self.distillation.rows)
        return read_texts(self.calibration, used + HELD_OUT_ROWS, SEED)

    def batches(self, texts: list[str], batch_size: int) -> list[dict[str, torch.Tensor]]:
        """Return texts as padded batches."""
        limit = positions_limit(self.target, 512)
        return text_batches(texts, self.tokenizer, max_tokens=limit, batch_size=batch_size)

    def measure(self, proxy: Any) -> dict[str, Any]:
        """Return KL, perplexity, speed and scores of a proxy."""
        near = compare(self.target, proxy, self.batches(self.texts[-HELD_OUT_ROWS:], 4))
        scored = evaluate_model(
            proxy, self.tokenizer, self.tasks, limit=self.limit, batch_tokens=4096, autocast=torch.bfloat16
        )
        return {**asdict(near), "parameters": parameter_count(proxy), "scores": scored.mean}

    def row(self, rule: str, removed: int, distilled: bool) -> dict[str, Any]:
        """Compress, distil on request, and measure."""
        name, options = RULES[rule]
        depth, total = len(Decoder.of(self.target)), parameter_count(self.target)
        ratio: dict[str, Any] = {"ratio": removed / depth}
        if name == "ffn_width":  # as many parameters as the blocks hold
            blocks = parameter_count(Decoder.of(self.target).blocks)
            ratio = {"ratio": removed / depth * blocks / total, "ratio_of": "parameters"}
        compressor = Compressor.by_name(name)(**ratio, **options)
        started = time.perf_counter()
        proxy, layer_map = compressor.compress(self.target, self.batches(self.texts[:CALIBRATION_ROWS], 16))
        seconds = {"compression": time.perf_counter() - started}
        if distilled:
            settings = self.distillation
            started = time.perf_counter()
            distil(
                proxy,
                self.target,
                self.batches(self.texts[: settings.rows], settings.batch_size),
                settings=settings,
                layer_map=layer_map,
                trainer={"accelerator": "cpu", "devices": 1, "precision": PRECISION},
                generator=generator(SEED, "distillation"),
                cache=cache_root() / "teacher",
            )
            seconds["distillation"] = time.perf_counter() - started
        found = self.measure(proxy)
        kept = list(layer_map.proxy_to_target)
        return {
            **found,
            "kept": kept,
            "seconds": seconds,
            "limit": self.limit,
            "steps": distilled * self.distillation.steps,
        }


def main(words: Sequence[str] | None = None) -> None:
    """Do what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="asset:smollm2-135m")
    parser.add_argument("--calibration", default="asset:calibration")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "openbookqa", "csqa", "socialiqa"])
    parser.add_argument("--removed", type=int, nargs="+", default=[8, 15], help="blocks removed")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--limit", type=int, default=100, help="questions per task")
    parser.add_argument("--steps", type=int, default=40, help="distillation steps of 16 texts")
    parser.add_argument("--lr", type=float, default=1e-3, help="distillation's learning rate")
    parser.add_argument("--recipe", default="fedproxy_llama", help="recipe of the fused rows; empty leaves them out")
    parser.add_argument("--results", type=Path, default=RESULTS / "fidelity")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    rows = min(16 * options.steps, 1000)
    settings = DistillationConfig(steps=options.steps, rows=rows, lr=options.lr, cache_teacher=True)
    study = Study(options.target, options.calibration, options.tasks, options.limit, settings, options.results)
    if not options.table:
        for asset in missing_assets(options.tasks):
            fetch(asset)
        for name, work in [*compressed_rows(study, options), *fused_rows(study, options.recipe)]:
            result = study.folder / f"{name}.json"
            if result.is_file():
                continue
            print(name, flush=True)
            write_json(result, work())
            write_tables(study.folder)
    write_tables(study.folder)


def compressed_rows(study: Study, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield every row's name and what makes it; the target's own comes first."""
    yield "target", lambda: study.measure(study.target)
    for removed in options.removed:
        for rule in options.rules:
            for distilled in (False, True):
                name = f"{rule}_{removed}{'_distilled' if distilled else ''}"
                yield name, lambda rule=rule, removed=removed, distilled=distilled: study.row(rule, removed, distilled)


def fused_rows(study: Study, recipe: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows that tune and fuse: half of the blocks removed by Block Influence."""
    settings = study.distillation
    words = [f"distillation.{key}={getattr(settings, key)}" for key in ("steps", "rows", "lr", "cache_teacher")]

    def fit(name: str) -> dict[str, Any]:
        out = Path("runs/fidelity") / name
        own = FUSED[name] if name == "plain" else (*words, *FUSED[name])
        models = "evaluation.models=[proxy,proxy_tuned,fused]"
        common = [f"recipe={recipe}", "compression.ratio=0.5", f"evaluation.limit={study.limit}", models]
        common.append(f"trainer.precision={PRECISION}")
        report = run(load_config([*common, "resume=auto", f"output_dir={out}", *own]))
        shutil.rmtree(out)
        return {"scores": {model: tasks["mean"] for model, tasks in report.scores.items()}}

    for name in FUSED if recipe else ():
        yield f"fused_{name}", lambda name=name: fit(name)


def write_tables(folder: Path) -> None:
    """Write docs/results/fidelity.md from the results that are there."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    removed = sorted(
        {name.removesuffix("_distilled").rsplit("_", 1)[1] for name in found if "kept" in found[name]}, key=int
    )
    lines = ["# Fidelity of proxies", "", "Written by `python -m benchmarks.fidelity_study`; its head says how. Speed:"]
    lines += [
        "tokens per second of a forward pass with the head, in multiples of the target's; both take turns.",
        "",
    ]
    for count in removed:
        lines += [f"## {count} blocks' worth removed", "", *HEAD]
        if "target" in found:
            lines.append(line("target", [found["target"]]))
        for rule in dict.fromkeys(name.rsplit("_", 1)[0] if name.startswith("random") else name for name in RULES):
            for tail, label in (("", ""), ("_distilled", ", distilled")):
                seeds = [name for name in RULES if name == rule or (rule == "random" and name.startswith("random"))]
                rows = [found[f"{name}_{count}{tail}"] for name in seeds if f"{name}_{count}{tail}" in found]
                if rows:
                    lines.append(line(f"{rule}{f' ({len(rows)} seeds)' if len(rows) > 1 else ''}{label}", rows))
        lines.append("")
    lines += fused_table(found)
    write_text(folder.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


HEAD = [
    "| proxy | KL, nats per token | perplexity | acc_norm, % | answer NLL | parameters, M | speed |",
    "|---|---:|---:|---:|---:|---:|---:|",
]


def line(label: str, rows: list[dict[str, Any]]) -> str:
    """Return a row of the table: means over seeds, with the lowest and highest KL where there are several."""

    def mean(pick: Any) -> float:
        return statistics.mean(pick(row) for row in rows)

    kls = [row["kl"] for row in rows]
    spread = f" ({min(kls):.2f} to {max(kls):.2f})" if len(rows) > 1 else ""
    error = mean(lambda row: 100 * row["scores"]["acc_norm_stderr"])
    return (
        f"| {label} | {mean(lambda row: row['kl']):.3f}{spread} | {mean(lambda row: row['proxy_perplexity']):.1f} "
        f"| {mean(lambda row: 100 * row['scores']['acc_norm']):.1f} ± {error:.1f} "
        f"| {mean(lambda row: row['scores']['answer_nll']):.2f} | {mean(lambda row: row['parameters']) / 1e6:.1f} "
        f"| {mean(lambda row: row['proxy_tokens_per_second'] / row['target_tokens_per_second']):.2f} |"
    )


def fused_table(found: Mapping[str, Any]) -> list[str]:
    """Return what distillation does after tuning and fusion."""
    rows = {name: found[f"fused_{name}"]["scores"] for name in FUSED if f"fused_{name}" in found}
    if not rows:
        return []
    lines = ["## After tuning and fusion (block_influence, half of the blocks removed)", ""]
    lines += ["| | proxy | tuned proxy | fused | fused, answer NLL |", "|---|---:|---:|---:|---:|"]
    for name, scores in rows.items():
        cells = [
            f"{100 * scores[model]['acc_norm']:.1f} ± {100 * scores[model]['acc_norm_stderr']:.1f}"
            for model in ("proxy", "proxy_tuned", "fused")
        ]
        lines.append(f"| {name.replace('_', ', ')} | {' | '.join(cells)} | {scores['fused']['answer_nll']:.2f} |")
    return lines


if __name__ == "__main__":
    main()

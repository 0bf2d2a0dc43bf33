"""Prefix sharing against stock HFLM: same model, requests and threads, in turns, in one run.

    python benchmarks/evaluation.py                                     # SmolLM2, 200 questions, zero-shot and 5-shot
    python benchmarks/evaluation.py limit=50 shots=[0] tasks=[arc_easy] batch_size=8 output=bench.json
    python benchmarks/evaluation.py limit=100 shots=[5] tasks=[gsm8k,triviaqa]          # answers that are generated
    python benchmarks/evaluation.py limit=4 shots=[5] tasks=[mmlu]                      # a group in one line

Each task's questions are cut into `parts`; for each part both models answer all requests, tokenisation included, and
who goes first alternates. Wall and CPU times are summed over parts; on a busy machine the CPU ratio is steadier.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from omegaconf import OmegaConf

from fedproxy.data.assets import resolve
from fedproxy.evaluation.harness import missing_assets
from fedproxy.evaluation.prefix_sharing import PrefixSharingLM
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_loading import expand, load_task, needed_splits
from fedproxy.models import load_model, load_tokenizer

CORE = ("arc_easy", "openbookqa", "csqa", "hellaswag")
"""Tasks whose times are added up for the headline ratio."""


@dataclass
class Options:
    """What the command line can set."""

    model: str = "asset:smollm2-135m"
    tasks: list[str] = field(default_factory=lambda: [*CORE, "piqa", "boolq"])
    limit: int = 200
    shots: list[int] = field(default_factory=lambda: [0, 5])
    parts: int = 2
    batch_size: int = 8  # stock HFLM's; the fastest of 4, 8, 16 and 32 on two cores
    batch_tokens: int = 2048  # ours
    threads: int = 2
    seed: int = 1234
    output: str | None = None


@dataclass
class Side:
    """One of the two models and the time it took."""

    lm: HFLM
    wall: float = 0.0
    cpu: float = 0.0

    def answer(self, requests):
        """Return the answers to lm-eval requests and add the time they took."""
        wall, cpu = time.perf_counter(), time.process_time()
        answers = getattr(self.lm, requests[0].request_type)(requests, disable_tqdm=True)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return answers


def measure(loaded, shots, options, ours, stock):
    """Run both models over one task in turns; return times, ratios and how far their answers differ."""
    loaded.prepare(shots, options.seed)
    loaded.task.build_all_requests(limit=options.limit)
    requests = loaded.task.instances
    by_question = {}
    for request in requests:
        by_question.setdefault(request.doc_id, []).append(request)
    questions = list(by_question.values())
    sides = {"ours": Side(ours), "stock": Side(stock)}
    difference, flips, greedy_flips = 0.0, 0, 0
    for part in range(options.parts):
        asked = questions[part :: options.parts]
        flat = [request for question in asked for request in question]
        order = ("ours", "stock") if part % 2 else ("stock", "ours")
        answers = {side: sides[side].answer(flat) for side in order}
        pairs = list(zip(answers["ours"], answers["stock"], strict=True))
        if flat[0].request_type == "loglikelihood":
            difference = max(difference, *(abs(a[0] - b[0]) for a, b in pairs))
            greedy_flips += sum(a[1] != b[1] for a, b in pairs)
        else:
            greedy_flips += sum(a != b for a, b in pairs)
        flips += count_flips(loaded.task, asked, answers)
    return {
        "task": loaded.task.config.task,
        "shots": shots,
        "questions": len(questions),
        "wall_s": {side: round(sides[side].wall, 2) for side in sides},
        "cpu_s": {side: round(sides[side].cpu, 2) for side in sides},
        "max_abs_difference": difference,
        "other_answers": flips,
        "other_greedy": greedy_flips,
    }


def count_flips(task, questions, answers):
    """Return on how many questions lm-eval's metrics of the two sides differ."""
    flips, start = 0, 0
    for question in questions:
        end = start + len(question)
        metrics = [task.process_results(question[0].doc, answers[side][start:end]) for side in ("ours", "stock")]
        flips += metrics[0] != metrics[1]
        start = end
    return flips


def line(label, rows):
    """Return one line of the table, times summed over ``rows``."""
    wall, cpu = (
        {side: sum(row[kind][side] for row in rows) for side in ("ours", "stock")} for kind in ("wall_s", "cpu_s")
    )
    return (
        f"{label:<24} {stock_and_ours(wall)} {wall['stock'] / wall['ours']:>6.2f}x   "
        f"{stock_and_ours(cpu)} {cpu['stock'] / cpu['ours']:>6.2f}x   {max(r['max_abs_difference'] for r in rows):.1e} "
        f"{sum(r['other_answers'] for r in rows):>8}"
    )


def stock_and_ours(seconds):
    """Return both times as two columns."""
    return f"{seconds['stock']:>8.1f} {seconds['ours']:>8.1f}"


def main(arguments):
    """Measure what the arguments ask for and print a table."""
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(arguments)))
    torch.set_num_threads(options.threads)
    for asset in missing_assets(expand(options.tasks)):
        resolve(f"asset:{asset}")
    path = resolve(options.model) or options.model
    model, tokenizer = load_model(path), load_tokenizer(path)
    print(f"{options.model} in float32, {options.limit} questions per task, {options.threads} threads")
    print(f"{'':<24} {'wall s':^25}   {'CPU s':^25}   {'max':7} {'other':>8}")
    times = f"{'stock':>8} {'ours':>8} {'ratio':>7}"
    print(f"{'task':<24} {times}   {times}   {'diff':7} {'answers':>8}")
    rows = []
    with quiet():
        ours = PrefixSharingLM(model, tokenizer, batch_tokens=options.batch_tokens)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
        for shots in options.shots:
            for name in options.tasks:
                asked = [
                    task for one in expand([name]) for task in load_task(one, None, needed_splits(one, None, shots))
                ]
                rows += [measure(loaded, shots, options, ours, stock) for loaded in asked]
                print(line(f"{name} {shots}-shot", rows[-len(asked) :]), flush=True)
            core = [row for row in rows if row["shots"] == shots and row["task"] in CORE]
            if core:
                print(line(f"core tasks {shots}-shot", core), flush=True)
    if options.output:
        facts = {"machine": platform.machine(), "torch": torch.__version__, "options": vars(options), "rows": rows}
        Path(options.output).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""A small made-up run with every optional part, for tests that look at pages and pairs."""

import numpy as np

from fedproxy.reporting import (
    CompressionReport,
    Cost,
    Exposure,
    Provenance,
    RoundReport,
    RunInfo,
    RunReport,
    with_means,
)
from fedproxy.reporting.samples import save_evaluation
from fedproxy.reporting.statistics import mean_stderr

TASKS = ("easy", "hard")
RATES = {"target": 0.40, "proxy": 0.35, "proxy_tuned": 0.42, "fused": 0.55}


def lm_eval_results(**changes):
    results = {
        "versions": dict.fromkeys(TASKS, 1.0),
        "n-shot": dict.fromkeys(TASKS, 0),
        "configs": {task: {"task": task, "doc_to_text": "{{query}}"} for task in TASKS},
        "lm_eval_version": "0.4.13",
    }
    return {**results, **changes}


def question(task, number, right, **changes):
    sample = {"task": task, "doc_id": number, "doc_hash": f"{task}-{number}", "prompt_hash": f"p-{task}-{number}"}
    return {**sample, "gold": 0, "loglikelihoods": [-3.0, -4.0], "acc": right, "acc_norm": right, **changes}


def answers(rate, seed=0, questions=40):
    """Return samples of ``rate`` right answers; models of one seed share what makes a question hard."""
    return [
        question(task, number, int(hardness < rate), answer_nll=3.0 - rate + hardness)
        for offset, task in enumerate(TASKS)
        for number, hardness in enumerate(np.random.default_rng([seed, offset]).random(questions))
    ]


def save_samples(run, seed=0, results=None, **rates):
    for model, rate in {**RATES, **rates}.items():
        save_evaluation(run, model, answers(rate, seed), results or lm_eval_results())


def full_report(clients=("anna & co", "b<i>ob", "client-with-a-rather-long-name", "d"), rounds=3):
    scores = {}
    for model, rate in RATES.items():
        samples = answers(rate)
        scores[model] = {}
        for task in TASKS:
            right = [sample["acc_norm"] for sample in samples if sample["task"] == task]
            value = {"acc_norm": float(np.mean(right)), "acc_norm_stderr": mean_stderr(right), "n": len(right)}
            scores[model][task] = {**value, "answer_nll": 3.0 - rate}
    scores = with_means(scores)
    lines = [_line(number, clients) for number in range(1, rounds + 1)]
    return RunReport(
        RunInfo("a-recipe-with-a-long-name_and-its-suffix", "fedproxy", "completed", 7, "2026-01-02T03:04:05Z", 99.0),
        scores,
        Cost(10_000_000, 6_000_000, 500_000, 3 * 2**22, 3 * 2**22, 50.0, 5.0, 30.0, 2**31),
        Exposure.measure(scores, 0.6),
        lines,
        Provenance({"torch": "2.13.0"}, "c0ffee", "ab" * 32, {"easy": "cd" * 32}, {"cpu": "x", "cores": 2}),
        CompressionReport([0.5, 0.2, 0.05, 0.04, 0.1, 0.3], [0, 1, 4, 5]),
        notes=["The target's weights are 4-bit, de-quantised to float32."],
    )


def _line(number, clients):
    size = len(clients)
    return RoundReport(
        number,
        clients,
        train_loss=[3.0 / number + 0.1 * index for index in range(size)],
        regularizer_loss=1e-9,
        heterogeneity=[0.6] * size,
        weights=[1 / size] * size,
        retention=[0.9] * size,
        conflict_mean=0.5 - 0.1 * number,
        cosine=np.eye(size) - 0.1,
        sign_agreement=0.6,
        kept_density=0.9,
        update_norms=[1.0] * size,
        factor_mean_error=0.3,
        upload_bytes=4 * 2**20,
        download_bytes=4 * 2**20,
        seconds=61.0,
    )

"""lm-eval's numbers for our local tasks against an independent plain loop on the same rows, and stock HFLM."""

import json
import re

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from fedproxy.data.assets import fetch
from fedproxy.evaluation.harness import evaluate_model
from fedproxy.evaluation.prefix_sharing import PrefixSharingLM
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.task_loading import load_task
from fedproxy.models import load_model, load_tokenizer

from .plain_loop import plain_scores

pytestmark = pytest.mark.real_model
LIMIT = 3


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2's words in its first four blocks: enough for the arithmetic, and quick."""
    path = fetch("smollm2-135m")
    model = load_model(path)
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    return model, load_tokenizer(path)


def asked(row):
    return f"Question: {row['question']}\nAnswer:"


def texts(row):
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


def untagged(text):
    """HellaSwag's WikiHow rows hold tags: a title ends a sentence, every other one goes."""
    text = re.sub(r"\[[^\]]*\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


GLUE = {  # task: (prompt, answers) written anew from the task's description; the label is the answer's index
    "sst2": ("{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:", ["negative", "positive"]),
    "mrpc": (
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ["no", "yes"],
    ),
    "rte": ("{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", ["True", "False"]),
}
TASKS = {  # task: split that lm-eval scores, folder, (prompt, answers, gold) written anew from the task's description
    "arc_easy": ("test", "arc_easy", lambda r: (asked(r), *texts(r))),
    "arc_challenge": ("test", "arc_challenge", lambda r: (asked(r), *texts(r))),
    "openbookqa": ("test", "openbookqa", lambda r: (r["question_stem"], *texts(r))),
    "csqa": ("validation", "csqa", lambda r: (asked(r), *texts(r))),
    "commonsense_qa": (
        "validation",
        "csqa",
        lambda r: (
            "\n".join(
                [f"Question: {r['question'].strip()}"]
                + [f"{letter}. {text}" for letter, text in zip("ABCDE", r["choices"]["text"], strict=True)]
                + ["Answer:"]
            ),
            list("ABCDE"),
            "ABCDE".index(r["answerKey"]),
        ),
    ),
    "socialiqa": (
        "validation",
        "socialiqa",
        lambda r: (
            f"Question: {r['context']} {r['question']}\nAnswer:",
            [r["answerA"], r["answerB"], r["answerC"]],
            int(r["label"]) - 1,
        ),
    ),
    "social_iqa": (
        "validation",
        "socialiqa",
        lambda r: (
            f"Q: {r['context']} {r['question']}\nA:",
            [r["answerA"], r["answerB"], r["answerC"]],
            int(r["label"]) - 1,
        ),
    ),
    "piqa": ("validation", "piqa", lambda r: (f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"])),
    "hellaswag": (
        "validation",
        "hellaswag",
        lambda r: (
            untagged(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"),
            [untagged(ending) for ending in r["endings"]],
            int(r["label"]),
        ),
    ),
    "boolq": (
        "validation",
        "boolq",
        lambda r: (f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ["no", "yes"], r["label"]),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_local_task_equals_a_plain_loop(task, smollm2):
    split, folder, question = TASKS[task]
    lines = (fetch("qa") / folder / f"{split}.jsonl").read_text().splitlines()[:LIMIT]
    questions = [question(json.loads(line)) for line in lines]
    plain = plain_scores(*smollm2, questions)
    result = evaluate_model(*smollm2, [task], limit=LIMIT)
    for sample, (values, acc, acc_norm, tokens), (_, _, gold) in zip(result.samples, plain, questions, strict=True):
        assert sample["loglikelihoods"] == pytest.approx(values, abs=1e-3)
        assert (sample["gold"], sample["acc"], sample["answer_tokens"]) == (gold, acc, tokens)
        assert sample.get("acc_norm", acc_norm) == acc_norm
    assert result.scores[task]["acc"] == pytest.approx(np.mean([acc for _, acc, _, _ in plain]))


@pytest.mark.parametrize("task", GLUE)
def test_local_glue_task_equals_a_plain_loop(task, smollm2):
    prompt, answers = GLUE[task]
    rows = [json.loads(line) for line in (fetch("glue") / task / "validation.jsonl").read_text().splitlines()[:LIMIT]]
    plain = plain_scores(*smollm2, [(prompt.format(**row), answers, row["label"]) for row in rows])
    result = evaluate_model(*smollm2, [task], limit=LIMIT)
    for sample, (values, acc, _, _), row in zip(result.samples, plain, rows, strict=True):
        assert sample["loglikelihoods"] == pytest.approx(values, abs=1e-3)
        assert (sample["gold"], sample["acc"]) == (row["label"], acc)


def test_winogrande_equals_a_plain_loop(smollm2):
    lines = (fetch("qa") / "winogrande" / "validation.jsonl").read_text().splitlines()[:LIMIT]
    result = evaluate_model(*smollm2, ["winogrande"], limit=LIMIT)
    for sample, row in zip(result.samples, map(json.loads, lines), strict=True):
        before, after = row["sentence"].split("_")
        values = [
            plain_continuation(*smollm2, before + row[option], " " + after.strip()) for option in ("option1", "option2")
        ]
        assert sample["loglikelihoods"] == pytest.approx(values, abs=1e-3)
        assert sample["acc"] == (int(row["answer"]) - 1 == int(np.argmax(values)))


@torch.no_grad()
def plain_continuation(model, tokenizer, context, continuation):
    tokens, start = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, tokens[i]]) for i in range(start, len(tokens)))


@pytest.mark.parametrize(("task", "shots"), [("hellaswag", 0), ("csqa", 5)])
def test_answers_equal_stock_hflm(task, shots, smollm2):
    (loaded,) = load_task(task, None, ("validation", "train"))
    loaded.prepare(shots, 0)
    with quiet():
        loaded.task.build_all_requests(limit=2)
        ours = PrefixSharingLM(*smollm2).loglikelihood(loaded.task.instances, disable_tqdm=True)
        stock = HFLM(pretrained=smollm2[0], tokenizer=smollm2[1], batch_size=8)
        expected = stock.loglikelihood(loaded.task.instances, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]

"""Accuracy of cloze questions without lm-eval: one forward per answer, straight from its definition."""

import torch


@torch.no_grad()
def plain_scores(model, tokenizer, questions):
    """Score (prompt, answers, gold) triples; returns per question (log-likelihoods, acc, acc_norm, gold tokens)."""
    scored = []
    for prompt, answers, gold in questions:
        values, lengths = [], []
        for answer in answers:
            tokens = tokenizer(f"{prompt} {answer}").input_ids
            start = len(tokenizer(prompt).input_ids)
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            values.append(sum(float(logprobs[i - 1, tokens[i]]) for i in range(start, len(tokens))))
            lengths.append(len(tokens) - start)
        normed = [value / len(answer) for value, answer in zip(values, answers, strict=True)]
        right = [max(range(len(v)), key=v.__getitem__) == gold for v in (values, normed)]
        scored.append((values, *right, lengths[gold]))
    return scored

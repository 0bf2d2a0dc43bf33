"""Scores of a model on held-out prompts and answers of one's own: likelihood of the answers, and generated ones."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import Example, tokenise
from fedproxy.evaluation.generation import generate
from fedproxy.evaluation.quiet import quiet
from fedproxy.evaluation.results import EvaluationResult, no_numbers
from fedproxy.evaluation.text_metrics import exact_match_and_f1, rouge_l
from fedproxy.models.checkpoints import special_ids
from fedproxy.models.modes import evaluating
from fedproxy.models.positions import positions
from fedproxy.task_means import mean_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedproxy.evaluation.evaluators.own_data import OwnData

Progress = Callable[[int, int], None]
_VERSION = 2
"""Goes up when a score of the same answers becomes another one."""


def score_rows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sources: Mapping[str, Sequence[Row]],
    settings: "OwnData",
    *,
    batch_tokens: int = 2048,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score a model on held-out rows.

    Every source has ``answer_nll``, nats per token of the right answers (sum over rows / sum of tokens), with the
    standard error of a ratio; ``perplexity``, its exponential; ``n`` rows. Where answers are generated, ``exact_match``
    and ``f1`` of short ones or ``rouge_l`` of long ones, means over rows with standard errors.

    Args:
        model: A causal language model on its device.
        tokenizer: Its tokenizer.
        sources: Rows by source, each at least one.
        settings: How they are asked.
        batch_tokens: Tokens per forward, padding included.
        autocast: Dtype of the matrix products before the head; None is the weights' own.
        progress: Called with (rows done, rows in all); a row counts twice where answers are generated.

    Raises:
        DataError: If a row has no tokens to ask or to answer.
    """
    start = time.perf_counter()
    sources = settings.taken(sources)
    rows = [row for own in sources.values() for row in own]
    examples = _examples(rows, tokenizer, model.config, settings)
    asked = [index for index, row in enumerate(rows) if settings.max_new_tokens and not row.is_text]
    with quiet(), evaluating(model), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        report, total = progress or (lambda done, of: None), len(rows) + len(asked)
        nlls = _answer_nlls(model, tokenizer, examples, batch_tokens, autocast, lambda done: report(done, total))
        generated = [examples[index] for index in asked]
        found, together = _answers(
            model, tokenizer, generated, settings, batch_tokens, lambda done: report(len(rows) + done, total)
        )
    texts = dict(zip(asked, found, strict=True))
    answered = iter(zip(rows, examples, nlls, map(texts.get, range(len(rows))), strict=True))
    samples = {
        source: [_sample(source, *next(answered), settings.judged_as(own), tokenizer) for _ in own]
        for source, own in sources.items()
    }
    flat = [sample for own in samples.values() for sample in own]
    scores = {source: _scores(own) for source, own in samples.items()}
    alone = [] if together else ["Answers are generated one by one: the model takes padding on the left for text."]
    return EvaluationResult(
        scores=scores,
        mean=mean_scores(scores),
        samples=flat,
        lm_eval=_details(sources, settings),
        seconds=time.perf_counter() - start,
        notes=[*_length_notes(sources, examples), *alone, *no_numbers(flat)],
    )


def scores_of_rows(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the scores of answered rows by source, whoever's model answered them; see :func:`score_rows`."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_source.setdefault(sample["task"], []).append(sample)
    return {source: _scores(own) for source, own in sorted(by_source.items())}


def rows_sha256(rows: Sequence[Row]) -> str:
    """Return the hash of what rows ask and answer, in their order."""
    text = json.dumps([[row.key, row.prompt, row.target, row.ends, row.messages, row.tools] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def own_data_notes(
    sources: Mapping[str, Sequence[Row]],
    settings: "OwnData",
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
) -> list[str]:
    """Return how many rows a model of that configuration has no room for.

    Raises:
        DataError: If a row has no tokens to ask or to answer.
    """
    sources = settings.taken(sources)
    return _length_notes(
        sources, _examples([row for own in sources.values() for row in own], tokenizer, config, settings)
    )


def _examples(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", settings: "OwnData"
) -> list[Example]:
    """Return rows as token ids, split into prompt and answer as in tuning; what has no room is cut.

    Of a conversation the last answer is asked for, whatever loss is taken on when it is trained on.
    """
    most = positions(config)
    longest = 1 << 30
    return tokenise(
        [replace(row, loss="target") if row.messages else row for row in rows],
        tokenizer,
        max_input_tokens=settings.max_prompt_tokens or longest,
        max_target_tokens=longest,
        max_tokens=most,
        apart=True,
    )


def _length_notes(sources: Mapping[str, Sequence[Row]], examples: Sequence[Example]) -> list[str]:
    notes, found = [], iter(examples)
    for source, rows in sources.items():
        own = [next(found) for _ in rows]
        prompts, answers = sum(item.prompt_cut for item in own), sum(item.target_cut for item in own)
        if prompts or answers:
            notes.append(
                f"{source}: of {len(rows)} held-out rows {prompts} lose the beginning of their prompt and {answers} "
                "the end of their answer: the model has no room for them, or max_prompt_tokens says so."
            )
    return notes


def _answer_nlls(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    batch_tokens: int,
    autocast: torch.dtype | None,
    report: Callable[[int], None],
) -> list[float]:
    """Return the negative log-likelihood of every answer, in nats; rows that begin alike share that."""
    from fedproxy.evaluation.prefix_sharing import PrefixSharingLM

    longest = max(len(example.input_ids) for example in examples)
    lm = PrefixSharingLM(
        model,
        tokenizer,
        batch_size=max(1, batch_tokens // longest),
        batch_tokens=batch_tokens,
        max_length=longest,
        autocast=autocast,
        on_progress=lambda done, of: report(done),
    )
    return [-value for value in lm.loglikelihood_of_tokens([_parts(example) for example in examples])]


def _parts(example: Example) -> tuple[list[int], list[int]]:
    """Return prompt and answer; what a template writes behind the answer is neither."""
    start, end = example.spans[-1]
    return list(example.input_ids[:start]), list(example.input_ids[start:end])


def _answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    settings: "OwnData",
    batch_tokens: int,
    report: Callable[[int], None],
) -> tuple[list[str], bool]:
    """Return a generated answer per row, and whether they could be generated in batches."""
    prompts = [_parts(example)[0] for example in examples]
    most = positions(model.config)
    limits = [min(settings.max_new_tokens, (most or 1 << 30) - len(prompt)) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    found, together = generate(model, prompts, limits, ends=ends, batch_tokens=batch_tokens, progress=report)
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in found]
    return [_before_stop(text, settings.stop).strip() for text in texts], together


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens by which the tokenizer or the model's settings end a text, sorted."""
    named = [token for name, token in special_ids(model.config.get_text_config()) if name == "eos_token_id"]
    own = getattr(model.generation_config, "eos_token_id", None)
    all_ = [*named, *(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(token) for token in all_ if token is not None})


def _before_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _sample(
    source: str,
    row: Row,
    example: Example,
    nll: float,
    text: str | None,
    judged: str,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    framed_by = [str(tokenizer.chat_template)] if row.messages else []
    sample: dict[str, Any] = {
        "task": source,
        "doc_id": row.key,
        "doc_hash": _sha256(row.prompt, row.target),
        "prompt_hash": _sha256(row.prompt, *framed_by),  # not as it is rendered: templates print the day's date
        "answer_nll": nll / example.target_length,
        "answer_tokens": example.target_length,
    }
    if text is None:
        return sample
    reference = row.target.strip()
    if judged == "short":
        sample["exact_match"], sample["f1"] = exact_match_and_f1(text, reference)
    else:
        sample["rouge_l"] = rouge_l(text, reference)
    return sample


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\x00".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _scores(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    tokens = [sample["answer_tokens"] for sample in samples]
    means = [math.nan if (nll := sample["answer_nll"]) is None else nll for sample in samples]
    nlls = [mean * count for mean, count in zip(means, tokens, strict=True)]
    ratio, count = math.fsum(nlls) / sum(tokens), len(samples)
    scores = {"answer_nll": ratio}
    if count > 1:
        residues = math.fsum((nll - ratio * size) ** 2 for nll, size in zip(nlls, tokens, strict=True))
        scores["answer_nll_stderr"] = math.sqrt(residues / (count - 1) / count) / (sum(tokens) / count)
    scores["perplexity"] = math.exp(min(ratio, 700.0))
    for name in ("exact_match", "f1", "rouge_l"):
        values = [sample[name] for sample in samples if name in sample]
        if values:
            scores[name] = statistics.fmean(values)
        if len(values) > 1:
            scores[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    scores["n"] = count
    return scores


def _details(sources: Mapping[str, Sequence[Row]], settings: "OwnData") -> dict[str, Any]:
    """Return what two evaluations must share to be compared, in the form of lm-eval's results file."""
    options = {**asdict(settings), "stop": list(settings.stop)}
    return {
        "configs": {
            source: {"evaluator": "own_data", **options, "judged_as": settings.judged_as(rows)}
            for source, rows in sources.items()
        },
        "versions": dict.fromkeys(sources, _VERSION),
        "n-shot": dict.fromkeys(sources, 0),
    }

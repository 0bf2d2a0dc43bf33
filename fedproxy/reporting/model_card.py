"""README.md of the folders `proxy/` and `fused/`."""

import json
from collections.abc import Mapping, Sequence

from fedproxy.errors import one_line
from fedproxy.reporting.markdown import escape, markdown_table
from fedproxy.reporting.view import score_hint, score_table
from fedproxy.task_means import Metrics

_HEADS = {
    "proxy": (
        "Proxy model",
        "A small language model for federated fine-tuning: clients tune it on their own data with LoRA and send back "
        "only the change of the LoRA parameters. It is meant as a starting point for tuning, not for use as it is.",
    ),
    "fused": (
        "Fused model",
        "The owner's model after federated tuning: what clients learned on a proxy was merged and plugged into it "
        "without further training.",
    ),
}
_SHOWN = {"proxy": ("proxy",), "fused": ("target", "fused")}


def model_card(
    kind: str,
    scores: Mapping[str, Mapping[str, Metrics]],
    *,
    method: str = "fedproxy",
    base_model: str | None = None,
    parameters: int | None = None,
    notes: Sequence[str] = (),
    wrapper: bool = False,
) -> str:
    """Return the text of a model card.

    The proxy goes to clients, so its card shows the proxy's own scores and nothing that would tell which model it was
    cut from or where: ``base_model``, ``method`` and ``notes`` are used for the fused model only.

    Args:
        kind: ``proxy`` or ``fused``.
        scores: Scores of a report, ``mean`` included; may be empty.
        method: Recipe's method label.
        base_model: Name of the target for the card's metadata.
        parameters: Size of the model, tied tensors once.
        notes: Sentences that belong next to the numbers.
        wrapper: The folder names three models instead of holding weights (fusion by logit_offset).

    Raises:
        ValueError: If ``kind`` is neither.
    """
    if kind not in _HEADS:
        raise ValueError(f"kind must be proxy or fused, got {kind!r}")
    title, words = _HEADS[kind]
    private = kind == "proxy"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [fedproxy, federated-learning]",
    ]
    if base_model and not private:
        lines.append(f"base_model: {json.dumps(one_line(base_model))}")  # YAML reads JSON
    lines += ["---", "", f"# {title}", "", words, ""]
    if parameters is not None:
        lines += [f"Parameters: {parameters:,}", ""]
    if not private:
        lines += [f"Method: {escape(method)}", "", *(f"> **Note.** {escape(note)}\n" for note in notes)]
    scores = {model: scores[model] for model in _SHOWN[kind] if model in scores}
    table = score_table(scores)
    if table:
        lines += ["## Scores", "", markdown_table(table), "", score_hint(scores), ""]
    return "\n".join([*lines, "## Load it", "", *_loading(wrapper)])


def _loading(wrapper: bool) -> list[str]:
    if wrapper:
        return [
            "The folder holds no weights: `config.json` names target, tuned and untuned proxy, whose logits are added.",
            "",
            "```python",
            "from fedproxy.models import load_model, load_tokenizer",
            "",
            'model, tokenizer = load_model("this folder"), load_tokenizer("this folder")',
            "```",
            "",
        ]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
    ]

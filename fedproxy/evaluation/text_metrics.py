"""How far a generated answer agrees with the right one: exact match, token F1 and ROUGE-L, by torchmetrics."""

import re

from torchmetrics.functional.text import rouge_score, squad

_NO_WORD = re.compile(r"[\W_]+")


def exact_match_and_f1(answer: str, reference: str) -> tuple[float, float]:
    """Return whether two answers are the same, and their F1 over words, both in [0, 1].

    By SQuAD's rules (Rajpurkar et al. 2016, arXiv 1606.05250): case, ASCII punctuation, English articles and blanks do
    not count.
    """
    found = squad(
        [{"prediction_text": answer, "id": "0"}], [{"answers": {"text": [reference], "answer_start": [0]}, "id": "0"}]
    )
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L (Lin 2004), in [0, 1]: of the longest common subsequence of words, case aside.

    Choice: a word is a run of letters and digits of any alphabet, without stemming. On ASCII text these are the words
    of the usual implementation, which takes other alphabets for blanks.
    """
    words = {"normalizer": lambda text: _NO_WORD.sub(" ", text.lower()), "tokenizer": str.split}
    found = rouge_score(answer, reference, rouge_keys="rougeL", **words)
    return float(found["rougeL_fmeasure"])

"""How far a generated answer agrees with the right one: exact match, token F1 and ROUGE-L."""

import re
from collections import Counter
from collections.abc import Callable
from string import punctuation

from torchmetrics.functional.text import rouge_score

_NO_WORD = re.compile(r"[\W_]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MARKS = re.compile(rf"((?<![^\W\d_])(?:[<>]=?|[-+.,:/])(?=[-+.]?\d))|[{re.escape(punctuation)}]")
"""ASCII punctuation; in group 1 what a number has before a digit: 0.5, -5, 120/80, <=3."""
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def exact_match_and_f1(answer: str, reference: str) -> tuple[float, float]:
    """Return whether two answers are the same, and their F1 over words, both in [0, 1].

    By SQuAD's rules (Rajpurkar et al. 2016, arXiv 1606.05250): case, ASCII punctuation, English articles and blanks do
    not count. Choice: the marks of a number do, so that 0.5 is not 05 and -5 is not 5, all but a comma before thousands
    (SQuAD drops them all); and where nothing of the right answer would count (``A``, ``+``), articles do, then
    punctuation too.
    """
    told: tuple[Callable[[str], str], ...] = (_without_articles, _without_marks, str.lower)
    found, wanted = next(
        ((rule(answer).split(), words) for rule in told if (words := rule(reference).split())), (answer.split(), [])
    )
    common = (Counter(found) & Counter(wanted)).total()
    return float(found == wanted), 2 * common / (len(found) + len(wanted)) if common else float(found == wanted)


def _without_marks(text: str) -> str:
    return _MARKS.sub(lambda mark: mark[1] or "", _THOUSANDS.sub("", text.lower()))


def _without_articles(text: str) -> str:
    return _ARTICLES.sub(" ", _without_marks(text))


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L (Lin 2004), in [0, 1]: of the longest common subsequence of words, case aside.

    Choice: a word is a run of letters and digits of any alphabet, without stemming. On ASCII text these are the words
    of the usual implementation, which takes other alphabets for blanks. A right answer without a word (``+``) is met or
    not.
    """
    if not _NO_WORD.sub("", reference):
        return float(answer.split() == reference.split())
    words = {"normalizer": lambda text: _NO_WORD.sub(" ", text.lower()), "tokenizer": str.split}
    found = rouge_score(answer, reference, rouge_keys="rougeL", **words)
    return float(found["rougeL_fmeasure"])

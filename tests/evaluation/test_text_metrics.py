import random

import pytest
from torchmetrics.functional.text import squad

from fedproxy.evaluation.text_metrics import exact_match_and_f1, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),  # case, article and mark do not count
        ("a tall tower in Paris", "Paris", 0.0, 0.4),  # 1 of 4 words right, 1 of 1 found: 2 * .25 * 1 / 1.25
        ("", "Paris", 0.0, 0.0),
        ("42", "42.", 1.0, 1.0),
        ("Größe 42", "größe 43", 0.0, 0.5),
        ("5.0 mg", "50 mg", 0.0, 0.5),  # a number's marks count, and only the unit is right
        ("-5", "5", 0.0, 0.0),
        ("<5", ">5", 0.0, 0.0),
        ("120/80", "12080", 0.0, 0.0),
        ("$1,500.", "1500", 1.0, 1.0),  # but not the comma before thousands, a currency, a full stop
        ("1,5", "15", 0.0, 0.0),
        ("50 %", "50%", 1.0, 1.0),
        ("e.g. B-12, 3", "eg b12 3", 1.0, 1.0),  # SQuAD's rule, where no number begins
        ("+", "-", 0.0, 0.0),  # of these right answers SQuAD's rule leaves nothing
        ("+", "+", 1.0, 1.0),
        ("", "A", 0.0, 0.0),
        ("the", "A", 0.0, 0.0),
        ("(a)", "A", 1.0, 1.0),
        ("A, since", "A", 0.0, 2 / 3),  # one of two words, one of one
    ],
)
def test_exact_match_and_f1_by_hand(answer, reference, match, f1):
    assert exact_match_and_f1(answer, reference) == (match, pytest.approx(f1))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 4 / 6),  # the cat on mat: 4 of 6 and 4 of 6
        ("sat cat", "cat sat", 0.5),  # one word in order
        ("", "cat", 0.0),
        ("Die Übung, schön", "die übung schön", 1.0),  # words of any alphabet
        ("これ は ペン", "これ は 本", 2 / 3),
        ("+", "+", 1.0),  # no word to compare
        ("-", "+", 0.0),
    ],
)
def test_rouge_l_by_hand(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-6)


def test_without_numbers_they_are_squads_own():
    draw, words = random.Random(0), ["a", "The", "cat,", "sat.", "it's", "(blue)", "mat", "--", "Él", "an", "tree-top"]
    pairs = [[" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(2)] for _ in range(300)]
    compared = 0
    for answer, reference in pairs:
        references = {"answers": {"text": [reference], "answer_start": [0]}, "id": "0"}
        theirs = squad([{"prediction_text": answer, "id": "0"}], [references])
        if set(reference.lower().split()) <= {"a", "an", "the", "--"}:  # nothing of it would count
            continue
        compared += 1
        own = exact_match_and_f1(answer, reference)
        assert own == (float(theirs["exact_match"]) / 100, pytest.approx(float(theirs["f1"]) / 100, abs=1e-6))
    assert compared > 200

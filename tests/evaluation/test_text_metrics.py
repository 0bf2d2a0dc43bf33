import pytest

from fedproxy.evaluation.text_metrics import exact_match_and_f1, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),  # case, article and mark do not count
        ("a tall tower in Paris", "Paris", 0.0, 0.4),  # 1 of 4 words right, 1 of 1 found: 2 * .25 * 1 / 1.25
        ("", "Paris", 0.0, 0.0),
        ("42", "42.", 1.0, 1.0),
        ("Größe 42", "größe 43", 0.0, 0.5),
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
    ],
)
def test_rouge_l_by_hand(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-6)

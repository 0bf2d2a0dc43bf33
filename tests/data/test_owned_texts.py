from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.rows import Row

WORDS = [f"w{i}" for i in range(12)]


def test_the_last_ten_words_decide():
    owned = OwnedTexts(
        [Row(" ".join(WORDS[:8]) + "\nAnswer:", " One  two", "s", "s/0"), Row("short", " row", "s", "s/1")]
    )
    tail = "w1 w2 w3 w4 w5 w6 w7 Answer: one two"
    assert f"w0 {tail}" in owned
    assert f"In other words,\n{tail.upper()}" in owned  # another start, other spaces and letters
    assert tail.replace("w1", "v1") not in owned  # the tenth from the end
    assert "Short row" in owned
    assert "a short row" not in owned
    assert "" not in owned


def test_no_rows_own_nothing():
    assert "anything" not in OwnedTexts([])

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


def test_the_turns_of_a_conversation_are_words_apart():
    turns = ({"role": "user", "content": "What hurts?"}, {"role": "assistant", "content": "My knee."})
    owned = OwnedTexts([Row("What hurts?", "My knee.", "s", "s/0", messages=turns), Row("It hu", "rts", "s", "s/1")])
    assert "What hurts?\nMy knee." in owned
    assert "what hurts? my knee." in owned
    assert "It hurts" in owned  # a prompt and its target are one text as they stand


def test_no_rows_own_nothing():
    assert "anything" not in OwnedTexts([])

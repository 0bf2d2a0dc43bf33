import pytest

from fedproxy.errors import ConfigError
from fedproxy.names import check_name, check_names, file_stem


@pytest.mark.parametrize("name", ["ward", "a b.c", "../up", "北京/民", "é", "x" * 100, "icu [3]"])
def test_good_names_pass(name):
    assert check_name(name, "data.files") == name


@pytest.mark.parametrize("name", ["", "x" * 101, " a", "a\n", "a\x1b[31m", "a\u202eb", 7, None, "a\u2028b"])
def test_bad_names_are_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=r"^data\.files: a name must be a text of 1 to 100 printable") as caught:
        check_name(name, "data.files")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("one", "two"), [("Ward", "ward"), ("é", "e\u0301"), ("É", "e\u0301"), ("straße", "STRASSE")])
def test_names_that_look_alike_are_refused(one, two):
    with pytest.raises(ConfigError, match="differ in case or composition alone"):
        check_names([one, "other", two], "data.files")


def test_file_stems_are_safe_and_differ():
    names = ["ward", "Ward", "a b", "a-b", "a/b", "..", "con", "北京", "x" * 300, "é", "e\u0301", ""]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    # slug of at most 40, a hyphen, 16 digits of the hash
    assert all(len(stem) <= 57 and stem.isascii() and stem.replace("-", "").isalnum() for stem in stems)
    assert file_stem("Ward A").startswith("ward-a-")

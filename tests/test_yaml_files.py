"""Recipe and study files of any content are read in bounded time, or refused in one line that names the file."""

import os

import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.config import check_arguments
from fedproxy.errors import ConfigError
from fedproxy.yaml_files import DEEPEST, dump_yaml, parse_yaml, read_mapping

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "binary": (b"\x7fELF\x00\xff\xfe", r"it is not UTF-8 text \(byte 5\)"),
    "nul": (b"seed: 1\x00", r"cannot be read: .*(special characters|control characters) are not allowed"),
    "latin": ("method: é\n".encode("latin-1"), r"it is not UTF-8 text \(byte 8\)"),
    "open": (b"seed: [1\n", r"line 2, column 1: did not find expected ',' or '\]'"),
    "tab": (b"client:\n\tlr: 1\n", r"line 2, column 1: found character that cannot start any token"),
    "twice": (b"seed: 1\nseed: 2\n", r"line 2, column 1: the key 'seed' stands twice"),
    "twice_below": (b"client: {lr: 1, lr: 2}\n", r"the key 'lr' stands twice"),
    "list_key": (b"? [a]\n: 1\n", r"line 1, column 3: a key must be a text or a number"),
    "python": (
        b"method: !!python/object/apply:os.system ['true']\n",
        r"the tag tag:yaml.org,2002:python/\S+ is not re",
    ),
    "path": (b"method: !!python/object/apply:pathlib.PosixPath [a]\n", r"line 1: the tag .* is not read"),
    "own_tag": (b"method: !mine a\n", r"line 1: the tag !mine is not read; write a plain value"),
    "set": (b"data: !!set {a}\n", r"line 1: the tag tag:yaml.org,2002:set is not read"),
    # Newer releases of PyYAML have a bound of their own, which comes first.
    "deep": (
        b"data: " + b"[" * 5000 + b"]" * 5000,
        rf"line 1(: it is nested more than {DEEPEST} deep|.* nesting depth)",
    ),
    "deep_blocks": ("".join(f"{' ' * n}a:\n" for n in range(400)).encode(), r"nested more than 30 deep"),
    "laughs": (LAUGHS.encode(), r"it stands for more than 50000 values"),
    "itself": (b"data: &a [*a]\n", r"line 1: an anchor holds itself"),
    "no_anchor": (b"data: *a\n", r"found undefined alias"),
    "huge": (b"# " + b"x" * (1 << 18), r"it has 262146 bytes, 262144 are the most that is read"),
    "digits": (b"seed: " + b"9" * 5000 + b"\n", r"limit \(4300 digits\)"),
    "documents": (b"seed: 1\n---\nseed: 2\n", r"but found another document"),
    "list": (b"- seed\n", r"must hold a mapping of keys to values; write lines such as `seed: 42`"),
    "word": (b"fedproxy\n", r"must hold a mapping of keys to values"),
    "number": (b"42\n", r"must hold a mapping of keys to values"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", ["recipe", "study"])
def test_what_is_no_readable_yaml_is_one_line(tmp_path, kind, case):
    content, message = BAD[case]
    path = tmp_path / f"{case}.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        (check_arguments if kind == "recipe" else read_study)([f"{kind}={path}"])
    assert str(caught.value).startswith(f"{kind} file {path}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_what_is_not_a_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "away.yaml").symlink_to(tmp_path / "gone")
    for name, reason in (("pipe", "not a regular file"), ("folder", "not a regular file"), ("away", "no such file")):
        with pytest.raises(ConfigError, match=f"{name}.yaml: .*{reason}"):
            check_arguments([f"recipe={tmp_path}/{name}.yaml"])
    with pytest.raises(ConfigError, match=r"pipe.yaml cannot be read: it is not a regular file; correct the file or"):
        read_study([f"study={tmp_path}/pipe.yaml"])


@pytest.mark.parametrize("value", ["[a, b]", "{a: b}", "3", "true"])
def test_extends_is_one_name(tmp_path, value):
    path = tmp_path / "r.yaml"
    path.write_text(f"extends: {value}\n")
    with pytest.raises(ConfigError, match=r"r.yaml: extends must be one recipe's name, got "):
        check_arguments([f"recipe={path}"])


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(f"extends: {other}\n")
    other.write_text(f"extends: {one}\n")
    with pytest.raises(ConfigError, match=r"extends itself through .*one.yaml'; remove one `extends`"):
        check_arguments([f"recipe={one}"])


@pytest.mark.parametrize(
    "text",
    [
        "1e3",
        "2026_11_29",
        "010",
        "0x1f",
        "1_000",
        "1:30",
        "2024-01-01",
        "on",
        "yes",
        "null",
        "~",
        ".inf",
        "a: b",
        "- a",
        "# x",
        "@x",
        "*a",
        "&a",
        "!t",
        "=",
        "<<",
        "",
        " a ",
        "two\nlines",
        "é漢",
        "\x07",
        "x" * 300,
        "+1",
        ".5",
        "?",
    ],
)
def test_texts_come_back_as_they_were_written(text):
    values = {"key": text, f"{text}.": [text, {"a": text}]}
    assert parse_yaml(dump_yaml(values)) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-3", -3),
        ("0x1f", 31),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("", None),
        ("null", None),
        ("010", "010"),
        ("2026_11_29", "2026_11_29"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
    ],
)
def test_what_is_a_number(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_anchors_and_merges_of_a_sensible_size_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffclient: &c {lr: 1.0e-3, epochs: 2}\nother: {<<: *c, epochs: 3}\n", encoding="utf-8")
    assert read_mapping(path, "recipe file") == {
        "client": {"lr": 1e-3, "epochs": 2}, "other": {"lr": 1e-3, "epochs": 3},
    }  # fmt: skip

"""Words of a command line: what is text by its declared type stays as it was typed, and nothing else changes."""

from dataclasses import dataclass, field

import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.config import load_config, to_yaml
from fedproxy.errors import ConfigError
from fedproxy.evaluate import parse_arguments
from fedproxy.files import at_home
from fedproxy.overrides import as_typed

TINY = "recipe=fedproxy_tiny"
ODD = [
    "2026_11_29",
    "1e3",
    "0x10",
    "1:30",
    "2026-11-29",
    "on",
    "no",
    "null",
    "~",
    "a: b",
    "#a",
    "[a]",
    "{a}",
    "*a",
    "é 北",
]


@pytest.mark.parametrize("text", ODD)
def test_paths_are_what_was_typed_in_every_command(text, tmp_path):
    config = load_config([TINY, f"output_dir={text}", f"data.files.ward={text}", "data.partition.name=file",
                          f"data.partition.path={text}"])  # fmt: skip
    assert (config.output_dir, config.data.files, config.data.partition.path) == (text, {"ward": text}, text)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config([f"recipe={tmp_path / 'again.yaml'}"]) == config
    assert parse_arguments([f"model={text}", f"output_dir={text}", "tasks=[a]"]).output_dir == text
    assert str(read_study(["recipes=[fedproxy_tiny]", f"output_dir={text}"]).output_dir) == str(at_home(text))


def test_words_of_lists_and_mappings_are_text_too():
    config = load_config([TINY, "data.tasks=[1e3,on]", "data.files={ward: 2026_11_29, 7: on}"])
    assert (config.data.tasks, config.data.files) == (["1e3", "on"], {"ward": "2026_11_29", "7": "on"})


def test_quotes_null_and_other_types_are_left_to_yaml():
    config = load_config(
        [TINY, 'output_dir="a b"', "data.label_column=null", "federation.rounds=1_0", "data.tasks=[a]"]
    )
    assert (config.output_dir, config.data.label_column, config.federation.rounds) == ("a b", None, 10)
    assert load_config([TINY, "federation.clients_per_round=2"]).federation.clients_per_round == 2
    assert load_config([TINY, "output_dir=runs/${recipe}"]).output_dir == "runs/fedproxy_tiny"


def test_a_key_that_nobody_declares_is_left_alone():
    @dataclass
    class Options:
        path: str = ""
        names: list[str] = field(default_factory=list)
        count: int = 0

    for word in ("count=1e3", "other=1e3", "path.deeper=1e3", "names=a,b", "names=[", "names=[[1]]"):
        assert as_typed(word, Options) == word
    assert as_typed("path=1e3", Options) == 'path="1e3"'
    assert as_typed("names=[1e3, b]", Options) == 'names=["1e3", "b"]'


def test_the_options_of_a_plugin_are_text_as_well(tmp_path, monkeypatch):
    (tmp_path / "plug_overrides.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedproxy.data.partition import Partition\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Partition, name='mine_overrides'):\n"
        "    folder: str = ''\n"
        "    def count(self, sources): return 1\n"
        "    def assign(self, rows, seed): return {'a': list(rows)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ("plugins=[plug_overrides]", "data.partition.name=mine_overrides", "data.partition.folder=2026_11_29")
    config = load_config([TINY, *words])
    assert config.data.partition.folder == "2026_11_29"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "output_dir: 20261129",
            r"^output_dir must be a text, and YAML reads 20261129 in its place; put it into quo",
        ),
        ("output_dir: on", r"^output_dir must be a text, and YAML reads True"),
        ("data: {files: {ward: 1e3}}", r"^data.files.ward must be a text, and YAML reads 1000.0"),
        ("data: {files: {2024: a.jsonl}}", r"^data.files: the name 2024 must be a text, and YAML reads 2024"),
        ("data: {tasks: [tiny_sums, 5]}", r"^data.tasks\[1\] must be a text, and YAML reads 5"),
    ],
)
def test_a_recipe_in_which_yaml_reads_a_number_is_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(f"extends: fedproxy_tiny\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_config([f"recipe={tmp_path / 'mine.yaml'}"])


def test_a_dot_in_the_name_of_a_source_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^data.files.ward must be a text, got a mapping: a dot .*; use a name without"
    ):
        load_config([TINY, "data.files.ward.a=rows.jsonl"])


def test_names_of_sources_are_checked(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.files: the names 'Ward' and 'ward' differ in case or composition alone"
    ):
        load_config([TINY, "data.files.Ward=a", "data.files.ward=b"])
    with pytest.raises(ConfigError, match=r"data.files: a name must be a text of 1 to 100 printable characters"):
        load_config([TINY, f"data.files.{'w' * 101}=a"])
    with pytest.raises(ConfigError, match=r"data.files must be named otherwise: the mean over sources has this name"):
        load_config([TINY, "data.files.Mean=a"])
    with pytest.raises(ConfigError, match=r"data.tasks names 'tiny_sums' twice; name each once"):
        load_config([TINY, "data.tasks=[tiny_sums,tiny_sums]"])
    with pytest.raises(ConfigError, match=r"data.files must be named differently from data.tasks, got \['tiny_sums'\]"):
        load_config([TINY, "data.files.Tiny_Sums=a"])

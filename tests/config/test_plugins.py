"""Plugins are Python code: a file that lists them needs the user's word on the command line before one is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.config import check_arguments, load_config
from fedproxy.errors import ConfigError

RULE = (
    "import pathlib\n"
    "from dataclasses import dataclass\n"
    "from fedproxy.strategies.aggregators import Aggregator\n"
    "pathlib.Path(__file__).with_name('imported').touch()\n"
    "@dataclass(frozen=True)\n"
    "class Rule(Aggregator, name='{name}'):\n"
    "    factor: float = 2.0\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a working directory with a module and a recipe that lists it, as they may be downloaded."""
    (tmp_path / "downloaded_rule.py").write_text(RULE.format(name=f"rule_{tmp_path.name}"))
    (tmp_path / "downloaded.yaml").write_text(
        f"extends: fedproxy_tiny\nplugins: [downloaded_rule]\naggregator: {{name: rule_{tmp_path.name}}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("downloaded_rule", None)


def test_a_recipe_files_plugins_wait_for_the_users_word(folder):
    message = (
        r"^recipe file \S+downloaded.yaml: plugins lists downloaded_rule, Python code that would run with your rights; "
        r"look at it, then add plugins=\[downloaded_rule\] to the command, or plugins=\[\] to go without$"
    )
    for call in (load_config, check_arguments):
        with pytest.raises(ConfigError, match=message):
            call(["recipe=downloaded.yaml"])
    assert not (folder / "imported").exists()


def test_named_on_the_command_line_they_are_imported(folder):
    config = load_config(["recipe=downloaded.yaml", "plugins=[downloaded_rule]", "aggregator.factor=3"])
    assert config.aggregator.factor == 3.0  # type: ignore[attr-defined]
    assert config.plugins == ["downloaded_rule"]
    assert (folder / "imported").exists()


def test_declined_they_are_not(folder):
    with pytest.raises(ConfigError, match=r"^aggregator.name: unknown aggregator 'rule_"):
        load_config(["recipe=downloaded.yaml", "plugins=[]"])
    assert load_config(["recipe=downloaded.yaml", "plugins=[]", "aggregator.name=fedavg"]).plugins == []
    assert not (folder / "imported").exists()


def test_the_command_line_names_all_that_are_imported(folder):
    (folder / "mine.py").write_text("")
    config = load_config(["recipe=downloaded.yaml", "plugins=[mine]", "aggregator.name=fedavg"])
    assert config.plugins == ["mine"]
    assert not (folder / "imported").exists()


def test_plugins_of_a_recipe_that_is_extended_need_it_too(folder):
    (folder / "outer.yaml").write_text("extends: downloaded.yaml\nseed: 1\n")
    with pytest.raises(ConfigError, match=r"downloaded.yaml: plugins lists downloaded_rule"):
        check_arguments(["recipe=outer.yaml"])


@pytest.mark.parametrize("words", [["ls"], ["show", "downloaded.yaml"], ["cp", "downloaded.yaml", "copy.yaml"]])
def test_looking_at_recipes_imports_nothing(folder, words):
    done = subprocess.run([sys.executable, "-m", "fedproxy.recipes", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "imported").exists()


def test_planning_one_asks_first(folder):
    command = [sys.executable, "-m", "fedproxy.recipes", "plan", "downloaded.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "plugins lists downloaded_rule" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "imported").exists()


@pytest.mark.parametrize(
    "changes",
    [
        "overrides: {plugins: [downloaded_rule]}\nmethods: {a: {recipe: fedproxy_tiny}}\n",
        "methods: {a: {recipe: fedproxy_tiny, plugins: [downloaded_rule]}}\n",
        "methods: {a: {recipe: downloaded.yaml}}\n",
        "recipes: [downloaded.yaml]\n",
    ],
)
def test_a_studys_plugins_need_the_same_word(folder, changes):
    (folder / "study.yaml").write_text(changes)
    with pytest.raises(ConfigError, match=r"plugins lists downloaded_rule, Python code .* add plugins="):
        read_study(["study=study.yaml"])
    assert not (folder / "imported").exists()
    study = read_study(["study=study.yaml", "plugins=[]", "aggregator.name=fedavg"])
    assert [load_config(method.arguments).plugins for method in study.methods] == [[]]
    assert not (folder / "imported").exists()
    study = read_study(["study=study.yaml", "plugins=[downloaded_rule]"])
    assert [load_config(method.arguments).plugins for method in study.methods] == [["downloaded_rule"]]


@pytest.mark.parametrize("key", ["plugins=[downloaded_rule] #", "[plugins]", "plugins[0]", "", "seed=1 plugins"])
def test_a_studys_keys_cannot_pose_as_words_of_the_user(folder, key):
    (folder / "study.yaml").write_text(f"methods: {{a: {{recipe: fedproxy_tiny, '{key}': [downloaded_rule]}}}}\n")
    with pytest.raises(ConfigError, match=r"a key must not be empty or hold a =|unknown key|one dot between"):
        read_study(["study=study.yaml"])
    assert not (folder / "imported").exists()


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("my_rule", r"plugins must be a list of module names like \[my_rule\], got 'my_rule'"),
        ("{a: b}", r"plugins must be a list of module names"),
        ("[1]", r"plugins: '1' is not a module's name"),
        ("[../my_rule]", r"plugins: '../my_rule' is not a module's name; write it as after `import`"),
        ("[my-rule]", r"plugins: 'my-rule' is not a module's name"),
        ("[random]", r"plugins: 'random' is a module of Python itself; give your module another name"),
        ("[os.path]", r"plugins: 'os.path' is a module of Python itself"),
        (
            "[no_such_module]",
            r"plugins: cannot import 'no_such_module' \(No module .*\); is its folder on PYTHONPATH",
        ),
        (
            "[broken_rule]",
            r"plugins: 'broken_rule' fails while it is imported \(ZeroDivisionError: .*\); correct",
        ),
        ("[leaving_rule]", r"plugins: 'leaving_rule' fails while it is imported \(SystemExit: 3\)"),
        ("[odd_rule]", r"plugins: 'odd_rule' fails while it is imported \(SyntaxError: "),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder, plugins, message):
    Path("broken_rule.py").write_text("1 / 0\n")
    Path("leaving_rule.py").write_text("raise SystemExit(3)\n")
    Path("odd_rule.py").write_text("def\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["recipe=fedproxy_tiny", f"plugins={plugins}"])
    assert "\n" not in str(caught.value)


def test_a_runs_own_configuration_needs_the_word_again(folder):
    """config.yaml is a recipe like any other: whoever sends a run folder could have written it."""
    from fedproxy.config import to_yaml

    Path("config.yaml").write_text(to_yaml(load_config(["recipe=downloaded.yaml", "plugins=[downloaded_rule]"])))
    with pytest.raises(ConfigError, match=r"config.yaml: plugins lists downloaded_rule"):
        load_config(["recipe=config.yaml"])
    assert load_config(["recipe=config.yaml", "plugins=[downloaded_rule]"]).plugins == ["downloaded_rule"]

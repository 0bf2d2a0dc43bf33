"""``${key}`` names another key of the configuration; nothing else behind a ``$`` is resolved, and nothing twice."""

import itertools

import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.config import load_config, to_yaml
from fedproxy.errors import ConfigError

SECRET = "s3cr3t-of-the-environment"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)


ODD = [
    "${oc.env:TOKEN}",
    "${oc.env:TOKEN,none}",
    "${oc.decode:'1'}",
    "${oc.create:1}",
    "${own:1}",
    "a ${oc.env:TOKEN} b",
    "${oc.env:${method}}",
    "${}",
    "${.seed}",
    "${seed",
    "${ce}/${",
    "${a b}",
    "$${oc.env:TOKEN}",
    "\\${oc.env:TOKEN}",
]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("key", ["method", "output_dir", "data.files.a", "target.path", "trainer.profiler"])
def test_a_recipe_that_asks_for_more_is_refused_with_file_and_key(tmp_path, key, text):
    path = tmp_path / "r.yaml"
    node = f"'{text.replace(chr(39), chr(39) * 2)}'"
    for part in reversed(key.split(".")):
        node = f"{{{part}: {node}}}"
    path.write_text(node)
    with pytest.raises(
        ConfigError, match=r"^recipe file \S+r.yaml: .* is not read: .*; write the value itself"
    ) as caught:
        load_config(["recipe=" + str(path)])
    assert f" {key}: " in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ODD)
def test_the_command_line_leaves_it_to_the_shell(text):
    with pytest.raises(ConfigError, match=r"^method: .* is not read: .*; let the shell put it in"):
        load_config(["recipe=fedproxy_tiny", f"method='{text.replace(chr(39), chr(39) * 2)}'"])


@pytest.mark.parametrize("line", ["title: '${oc.env:TOKEN}'", "methods: {'${oc.env:TOKEN}': {recipe: fedproxy_tiny}}"])
def test_a_study_that_asks_for_more_is_refused_with_file_and_key(tmp_path, line):
    path = tmp_path / "s.yaml"
    path.write_text(f"{line}\n" + ("" if "methods" in line else "recipes: [fedproxy_tiny]\n"))
    with pytest.raises(ConfigError, match=r"^study file \S+s.yaml: (title|methods\.\S+): .* is not read"):
        read_study([f"study={path}"])


def test_overrides_of_a_study_are_looked_at_too(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("recipes: [fedproxy_tiny]\noverrides: {method: '${oc.env:TOKEN}'}\n")
    with pytest.raises(ConfigError, match=r"s.yaml: overrides.method: \$\{oc.env:TOKEN\} is not read"):
        read_study([f"study={path}"])


def test_references_to_keys_are_put_in(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "extends: fedproxy_tiny\nseed: 7\nmethod: mine\noutput_dir: runs/${method}_${seed}\n"
        "evaluation: {tasks: '${data.tasks}', seed: '${seed}', limit: '${data.rows_per_task}'}\n"
    )
    config = load_config([f"recipe={path}", "method=yours"])
    assert config.output_dir == "runs/yours_7"
    assert config.evaluation.tasks == config.data.tasks
    assert config.evaluation.seed == 7
    assert config.evaluation.limit == config.data.rows_per_task


def test_a_reference_may_name_a_key_that_has_its_default():
    config = load_config(["recipe=fedproxy_tiny", "compression.name=random", "compression.seed=${seed}"])
    assert config.compression.seed == config.seed  # type: ignore[attr-defined]
    assert load_config(["target.path=a", "data.tasks=[b]", "output_dir=${method}_${seed}"]).output_dir == "custom_42"


def test_a_study_may_name_its_own_keys(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("title: wards\nrecipes: [fedproxy_tiny]\noutput_dir: 'out/${title}'\n")
    assert str(read_study([f"study={path}"]).output_dir) == "out/wards"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=${method}"], r"method: \$\{method\} refers to itself; write the value itself"),
        (["method=${output_dir}", "output_dir=${method}"], r"refers to itself"),
        (["method=${sed}"], r"method: \$\{sed\} names a key that .* sets; did you mean 'seed'\?"),
        (["method=${data.file}"], r"\$\{data.file\} names a key"),
        (["method=${data.tasks.x}"], r"\$\{data.tasks.x\} names a key"),
        (["method=$", "output_dir=${method}{oc.env:TOKEN}"], r"output_dir: .* would become a reference again"),
        (["method=xxxxxxxxxxxxx", "output_dir=" + "${method}" * 900], r"would become a text of more than 10000 char"),
    ],
)
def test_references_that_lead_nowhere_are_one_line(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["recipe=fedproxy_tiny", *words])
    assert SECRET not in str(caught.value)


def test_references_that_multiply_are_stopped():
    names = ["method", *(f"trainer.k{number}" for number in range(40))]
    words = [f"{name}=${{{below}}}${{{below}}}" for name, below in itertools.pairwise(names)]
    with pytest.raises(ConfigError, match=r"more than 1000 references are followed"):
        load_config(["recipe=fedproxy_tiny", *words, f"{names[-1]}="])


def test_what_is_kept_can_be_read_again_and_stays_the_same(tmp_path):
    config = load_config(["recipe=fedproxy_tiny", "method='$HOME {oc.env:TOKEN} $(id)'", "output_dir=2026_11_29"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config([f"recipe={path}"]) == config
    assert config.method == "$HOME {oc.env:TOKEN} $(id)"
    assert SECRET not in path.read_text()

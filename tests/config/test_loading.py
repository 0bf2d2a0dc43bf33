"""Configuration: defaults < recipe < command line; every mistake is one line with the key, the rule and a hint."""

from pathlib import Path

import pytest

from fedproxy.config import load_config, to_dict, to_yaml
from fedproxy.errors import ConfigError
from fedproxy.modules.trainer import check_trainer_options
from fedproxy.recipe_files import recipe_names, recipes_folder

LLAMA = "recipe=fedproxy_llama"


def test_every_file_under_recipes_loads_and_starts_with_a_comment():
    files = sorted(recipes_folder().rglob("*.yaml"))
    assert len(files) == len(recipe_names()) >= 5
    for name in recipe_names():
        config = load_config([f"recipe={name}"])
        assert config.recipe == name
        assert config.output_dir == f"runs/{name}"
        check_trainer_options(config.trainer)
        assert (recipes_folder() / f"{name}.yaml").read_text().startswith("# ")


def test_command_line_wins_over_the_recipe_and_interpolations_resolve_last():
    config = load_config([LLAMA, "federation.rounds=7", "method=mine", "output_dir=runs/${method}/${seed}", "seed=3"])
    assert config.federation.rounds == 7
    assert config.client.lr == 1e-3  # from the recipe
    assert config.fusion.name == "plug_in"
    assert config.output_dir == "runs/mine/3"


def test_another_class_drops_the_recipes_options_of_that_node_only():
    # the recipe sets h_ties' r0, delta and rho, which ties does not have
    config = load_config([LLAMA, "aggregator.name=ties", "aggregator.density=0.4"])
    assert config.aggregator.name == "ties"
    assert config.aggregator.density == 0.4  # type: ignore[attr-defined]
    assert config.compression.ratio == 0.27  # type: ignore[attr-defined]


def test_the_same_class_keeps_the_recipes_options():
    config = load_config([LLAMA, "aggregator.name=h_ties", "aggregator.rho=1.5"])
    assert (config.aggregator.delta, config.aggregator.rho) == (0.2, 1.5)  # type: ignore[attr-defined]


def test_a_runs_yaml_is_itself_a_recipe(tmp_path):
    config = load_config(["recipe=paper/fedproxy_llama2_7b_homogeneous", "data.partition.clients=6"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config([f"recipe={path}"]) == config


def test_extends_takes_over_what_it_does_not_set():
    config = load_config(["recipe=paper/fedproxy_mistral_7b_heterogeneous"])
    assert config.target.path == "mistralai/Mistral-7B-v0.1"
    assert config.target.dtype == "bfloat16"
    assert to_dict(config.trainable)["r"] == 32


def test_paper_recipe_has_the_papers_values():
    # the paper's hyperparameters
    config = load_config(["recipe=paper/fedproxy_llama2_7b_heterogeneous"])
    assert config.target.path == "meta-llama/Llama-2-7b-hf"
    assert (config.compression.name, config.compression.ratio) == ("block_influence", 0.5)  # type: ignore[attr-defined]
    assert (config.compression.calibration.rows, config.compression.calibration.max_tokens) == (512, 512)
    client = config.client
    assert (client.lr, client.epochs, client.batch_size * client.accumulate) == (5e-5, 10, 16)
    lora = to_dict(config.trainable)
    assert (lora["r"], lora["alpha"], lora["dropout"], len(lora["modules"])) == (32, 64, 0.1, 7)
    assert to_dict(config.regularizer) == {"name": "conflict", "strength": 1e-5}
    rule = to_dict(config.aggregator)
    assert (rule["name"], rule["r0"], rule["delta"], rule["rho"], rule["eps"]) == ("h_ties", 1.0, 0.2, 1.1, 1e-12)
    assert (config.data.max_input_tokens, config.data.max_target_tokens, config.data.rows_per_task) == (64, 128, 5000)
    assert (len(config.data.tasks), config.federation.rounds, config.distillation.steps) == (8, 10, 0)


def test_plugins_register_their_components(tmp_path, monkeypatch):
    (tmp_path / "twice_rule.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedproxy.strategies.aggregators import Aggregator\n"
        "@dataclass(frozen=True)\n"
        "class Twice(Aggregator, name='twice_the_mean'):\n"
        "    factor: float = 2.0\n"
        "    def combine(self, deltas, weights):\n"
        "        return self.factor * deltas.mean(dim=0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config([LLAMA, "plugins=[twice_rule]", "aggregator.name=twice_the_mean", "aggregator.factor=3"])
    assert to_dict(config.aggregator) == {"name": "twice_the_mean", "factor": 3.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=fedproxy_lama"], r"unknown recipe; did you mean 'fedproxy_llama'\?"),
        (["recipe=nowhere.yaml"], r"recipe=nowhere.yaml: no such file"),
        ([LLAMA, "federation.round=3"], r"^federation.round: unknown key; did you mean 'rounds'\?"),
        ([LLAMA, "feederation.rounds=3"], r"^feederation: unknown key; did you mean 'federation'\?"),
        ([LLAMA, "aggregator.name=h_tie"], r"^aggregator.name: unknown aggregator 'h_tie'; did you mean 'h_ties'\?"),
        ([LLAMA, "aggregator.densty=1"], r"^aggregator.densty: unknown key; did you mean"),
        ([LLAMA, "aggregator.rho=0.5"], r"^aggregator.rho must be >= 1, got 0.5"),
        ([LLAMA, "client.lr=abc"], r"^client.lr must be a number, got 'abc'$"),
        ([LLAMA, "client.lr=0"], r"^client.lr must be positive, got 0"),
        ([LLAMA, "seed=1.5"], r"^seed must be a whole number, got 1.5$"),
        ([LLAMA, f"seed={2**63}"], r"^seed must be at most 9223372036854775807 in size, got 9223372036854775808; give"),
        ([LLAMA, f"client.batch_size={10**30}"], r"^client.batch_size must be at most 9223372036854775807 in size"),
        ([LLAMA, f"compression.keep=[{10**30}]"], r"^compression.keep must be at most 9223372036854775807 in size"),
        ([LLAMA, "client.packing=2"], r"^client.packing must be true or false, got 2$"),
        ([LLAMA, "client.packing='-1'"], r"^client.packing must be true or false, got '-1'$"),
        ([LLAMA, "output_dir="], r"^output_dir must be a folder; . is this one, got ''$"),
        ([LLAMA, "client.lr=None"], r"client.lr=None would be the text 'None'; write client.lr=null"),
        ([LLAMA, "overwrite"], r"'overwrite' is not a key=value argument"),
        ([LLAMA, "--rounds=3"], r"'--rounds=3' is not a key=value argument"),
        ([LLAMA, "data.tasks=[a"], r"^data.tasks: "),
        ([LLAMA, "data.tasks=3"], r"^data.tasks must be a list of words like \[a,b\], got 3$"),
        ([LLAMA, "data.tasks=[[1]]"], r"^data.tasks must be a list of words like \[a,b\], got \[\[1\]\]$"),
        ([LLAMA, "data.files=[a]"], r"^data.files must be a mapping of names to texts like \{a: b\}, got \['a'\]$"),
        (
            [LLAMA, "compression.keep=[a]"],
            r"^compression.keep must be a list of whole numbers like \[0,1\], or null, got \['a'\]$",
        ),
        (
            [LLAMA, "compression.keep=3"],
            r"^compression.keep must be a list of whole numbers like \[0,1\], or null, got 3$",
        ),
        ([LLAMA, "compression.keep={a: 1}"], r"^compression.keep must be a list of whole numbers like"),
        ([LLAMA, "data.tasks=[]"], r"^data.tasks must be non-empty"),
        ([LLAMA, "fusion.mode=add"], r"^fusion.mode must be one of replace, delta, got 'add'$"),
        (
            [LLAMA, "output_dir=${nix}"],
            r"^output_dir: \$\{nix\} names a key that neither the recipe nor",
        ),
        ([LLAMA, "plugins=[no_such_module]"], r"plugins: cannot import 'no_such_module'"),
        ([LLAMA, "evaluation.models=[fusd]"], r"evaluation.models: unknown model 'fusd'; did you mean 'fused'\?"),
        ([LLAMA, "loggers=[wand]"], r"loggers: unknown logger 'wand'"),
        ([LLAMA, "resume=auto", "overwrite=true"], r"^resume must be never where overwrite=true"),
        ([LLAMA, "aggregator=3"], r"^aggregator must be a mapping of options, got 3"),
        (["federation.rounds=1"], r"target.path is missing; give it in the recipe or as target.path=VALUE"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(f"extends: {path}\nseed: 1\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config([f"recipe={path}"])


def test_broken_yaml_names_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("seed: [1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml cannot be read"):
        load_config([f"recipe={path}"])


def test_recipes_are_beside_the_package():
    assert (Path(recipes_folder()) / "fedproxy_tiny.yaml").is_file()

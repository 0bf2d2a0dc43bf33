import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.comparison.compare import _check_scored
from fedproxy.comparison.execution import cells
from fedproxy.comparison.fairness import check_fair, passes, settings_that_differ
from fedproxy.config import load_config
from fedproxy.errors import ConfigError
from fedproxy.pipeline.checks import check_components
from fedproxy.recipe_files import study_names


def tiny(*overrides):
    return load_config(["recipe=fedproxy_tiny", *overrides])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.rows_per_task=8", "data.rows_per_task"),
        ("data.tasks=[tiny_sums]", "data.tasks"),
        ("data.files.ward=a.jsonl", "data.files"),
        ("data.max_input_tokens=9", "data.max_input_tokens"),
        ("evaluation.tasks=[tiny_sums]", "evaluation.tasks"),
        ("evaluation.limit=9", "evaluation.limit"),
        ("evaluation.num_fewshot=1", "evaluation.num_fewshot"),
        ("evaluation.seed=1", "evaluation.seed"),
        ("target.path=asset:smollm2-135m", "target.path"),
        ("target.dtype=bfloat16", "target.dtype"),
        ("data.partition.name=iid", "data.partition"),
        ("trainer.precision=bf16-mixed", "trainer.precision"),
        ("trainer.deterministic=true", "trainer.deterministic"),
    ],
)
def test_methods_on_other_data_or_questions_are_refused_by_key(override, key):
    with pytest.raises(ConfigError, match=rf"^{key}.*: a has .* and b has .*; methods are compared on the same data"):
        check_fair(
            {"a": tiny(), "b": tiny(override, "evaluation.tasks=[tiny_sums]") if "files" in key else tiny(override)}
        )


def test_pooled_data_are_the_same_rows_in_one_hand():
    check_fair({"a": tiny(), "b": tiny("data.partition.name=pooled"), "c": tiny("evaluation.models=[target]")})
    check_fair({"a": tiny(), "b": tiny("trainer.devices=1", "trainer.accelerator=cpu")})
    one, other = tiny("data.partition.name=iid"), tiny("data.partition.name=iid", "data.partition.clients=3")
    with pytest.raises(ConfigError, match=r"data.partition: a has .*4.* and c has .*3"):
        check_fair({"a": one, "b": tiny("data.partition.name=pooled"), "c": other})


def test_a_budget_of_examples_is_equal_unless_said_otherwise():
    # 6 rounds of 1 epoch = 3 rounds of 2; half the clients need twice the rounds; zero rounds train nothing
    same = {
        "a": tiny(),
        "b": tiny("federation.rounds=3", "client.epochs=2"),
        "c": tiny("federation.rounds=12", "federation.clients_per_round=2"),
        "zero_shot": tiny("federation.rounds=0"),
    }
    assert [passes(config) for config in same.values()] == [6, 6, 6, 0]
    check_fair(same)
    other = {**same, "d": tiny("federation.rounds=5")}
    with pytest.raises(
        ConfigError, match=r"a sees every row 6 times and d 5 times; make them equal, or say budget=any"
    ):
        check_fair(other)
    check_fair(other, budget="any")


def test_what_differs_is_told_against_what_most_methods_have():
    found = settings_that_differ({"a": tiny(), "b": tiny("client.lr=0.5", "seed=9"), "c": tiny("aggregator.rho=1.5")})
    assert found == {"a": {}, "b": {"client.lr": 0.5}, "c": {"aggregator.rho": 1.5}}


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_are_fair_and_their_methods_fit_together(name):
    study = read_study([f"study={name}"])
    configs = {cell.method.label: cell.config for cell in cells(study) if cell.seed == study.seeds[0]}
    check_fair(configs, budget=study.budget)
    _check_scored(configs, study)
    for config in configs.values():
        check_components(config)
    assert study.reference in configs
    assert study.ceiling in configs if study.budget == "equal" else study.ceiling is None
    assert len(study.seeds) == 2
    assert all((config.evaluation.limit or 150) >= 150 for config in configs.values())

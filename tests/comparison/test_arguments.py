from pathlib import Path

import pytest

from fedproxy.comparison.arguments import read_study
from fedproxy.comparison.execution import cells
from fedproxy.errors import ConfigError
from fedproxy.recipe_files import recipe_names, study_names


def test_recipes_seeds_and_overrides_of_the_command_line():
    study = read_study(["recipes=[fedproxy_tiny,paper/fedproxy_llama2_7b_homogeneous]", "seeds=[1,2]", "client.lr=0.5"])
    assert [method.label for method in study.methods] == ["fedproxy_tiny", "paper-fedproxy_llama2_7b_homogeneous"]
    assert study.methods[0].arguments == ("recipe=fedproxy_tiny", "client.lr=0.5")
    assert (study.seeds, study.budget, study.ceiling, study.reference) == ([1, 2], "equal", None, None)
    assert (study.output_dir, study.work_dir) == (Path("runs/comparison"), Path("runs/comparison/work"))


def test_ceiling_and_reference_are_found_by_their_usual_names(tmp_path):
    for name in ("centralised", "fedproxy"):
        (tmp_path / f"{name}.yaml").write_text("extends: fedproxy_tiny\n")
    study = read_study([f"recipes=[{tmp_path}/centralised.yaml,{tmp_path}/fedproxy.yaml]"])
    assert (study.ceiling, study.reference) == ("centralised", "fedproxy")


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: Mine\nseeds: [3, 4]\noutput_dir: out\nwork_dir: work\nreference: half\n"
        "overrides: {evaluation: {limit: 7}, target: {dtype: float32}}\n"
        "methods:\n"
        "  plain: {recipe: fedproxy_tiny}\n"
        "  half: {recipe: fedproxy_tiny, compression: {ratio: 0.34}, aggregator: {name: fedavg}}\n"
        "  tuned: {recipe: fedproxy_tiny, scored: proxy_tuned, client: {max_grad_norm: null}}\n"
    )
    return path


def test_a_study_file_labels_variants_of_one_recipe(study_file):
    study = read_study([f"study={study_file}", "seeds=[5]", "client.lr=0.25"])
    assert (study.title, study.seeds, study.reference) == ("Mine", [5], "half")
    configs = {cell.method.label: cell.config for cell in cells(study)}
    assert {config.evaluation.limit for config in configs.values()} == {7}
    assert {config.client.lr for config in configs.values()} == {0.25}
    assert configs["half"].compression.ratio == 0.34
    assert configs["half"].aggregator.name == "fedavg"
    assert configs["plain"].aggregator.name == "h_ties"
    assert configs["tuned"].client.max_grad_norm is None
    assert study.methods[2].scored == "proxy_tuned"
    assert configs["half"].output_dir == "work/runs/half/seed_5"
    assert configs["half"].seed == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"recipes is missing; write, for example, recipes=\[fedot,fedproxy\] or study=NAME"),
        (
            ["recipes=[fedproxy_tiny]", "seeds=[]"],
            r"seeds must be a list of different whole numbers such as .* got \[\]",
        ),
        (["recipes=[fedproxy_tiny]", "seeds=[1,1]"], r"seeds must be .* got \[1, 1\]"),
        (["recipes=[fedproxy_tiny]", "seeds=[1.5]"], r"seeds must be .* got \[1.5\]"),
        (["recipes=[fedproxy_tiny]", "seeds=7"], r"seeds must be .* got 7"),
        (["recipes=fedproxy_tiny"], r"recipes must be a list of names such as .* got 'fedproxy_tiny'"),
        (["recipes=[fedproxy_tiny,fedproxy_tiny]"], r"recipes names 'fedproxy_tiny' twice"),
        (["recipe=fedproxy_tiny"], r"recipe is not an argument of a comparison; write recipes=\[NAME,...\]"),
        (["recipes=[fedproxy_tiny]", "seed=3"], r"seed is not an argument of a comparison; write seeds="),
        (["recipes=[fedproxy_tiny]", "overwrite=true"], r"overwrite is not .* delete the record of a run, and with"),
        (["recipes=[fedproxy_tiny]", "ceiling=fedproxy_tinny"], r"ceiling=fedproxy_tinny: .* mean 'fedproxy_tiny'\?"),
        (["recipes=[fedproxy_tiny]", "budget=some"], r"budget must be one of equal, any, got 'some'"),
        (["recipes=[fedproxy_tiny]", "equal_bytes=all"], r"equal_bytes must be one of least, most, fedproxy_tiny, n"),
        (["recipes=[fedproxy_tiny]", "keep_runs=perhaps"], r"keep_runs must be true or false, got 'perhaps'"),
        (["fedproxy_tiny"], r"'fedproxy_tiny' is not a key=value argument"),
        (["study=heterogenous_4"], r"study=heterogenous_4: unknown study; did you mean 'heterogeneous_4'\?"),
        (["study=gone.yaml"], r"study file gone.yaml cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_study(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methode: {}\n", r"unknown key 'methode'; did you mean 'methods'\?"),
        ("methods: {a: 3}\n", r"methods.a must be a mapping with a recipe, such as {recipe: fedproxy}, got 3"),
        ("methods: {a/b: {recipe: x}}\n", r"methods.a/b: a label names a folder"),
        ("methods: {a: {recipe: x, scored: fuse}}\n", r"methods.a.scored: unknown model 'fuse'; did you mean 'fused'"),
        ("- a\n", r"must hold a mapping"),
    ],
)
def test_a_study_file_that_cannot_be_used_is_one_line(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study([f"study={tmp_path / 's.yaml'}"])


def test_an_unknown_recipe_or_key_names_the_method_and_the_nearest():
    with pytest.raises(ConfigError, match=r"fedproxy_tinny: recipe=fedproxy_tinny: .* did you mean 'fedproxy_tiny'\?"):
        cells(read_study(["recipes=[fedproxy_tiny,fedproxy_tinny]"]))
    with pytest.raises(ConfigError, match=r"fedproxy_tiny: client.lrr: unknown key; did you mean 'lr'\?"):
        cells(read_study(["recipes=[fedproxy_tiny]", "client.lrr=1"]))


@pytest.mark.parametrize("name", study_names())
def test_every_shipped_study_can_be_read_and_its_methods_may_be_compared(name):
    from fedproxy.comparison.fairness import check_fair

    study = read_study([f"study={name}"])
    assert len(study.seeds) == 2
    labels = {method.label for method in study.methods}
    assert study.reference in labels
    assert study.ceiling in labels if study.budget == "equal" else study.ceiling is None
    missing = {method.arguments[0].removeprefix("recipe=") for method in study.methods} - set(recipe_names())
    assert not missing
    configs = {cell.method.label: cell.config for cell in cells(study) if cell.seed == study.seeds[0]}
    check_fair(configs, budget=study.budget)

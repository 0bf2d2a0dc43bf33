"""Every method is a recipe: it loads, names the components that the design's table says, and runs end to end."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.comparison.fairness import check_fair
from fedproxy.config import load_config, to_dict
from fedproxy.data.assets import resolve
from fedproxy.errors import ConfigError, FedProxyError
from fedproxy.files import file_sha256
from fedproxy.models import load_model, state_sha256
from fedproxy.names import file_stem
from fedproxy.pipeline.checks import check_components
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.run import run
from fedproxy.recipe_files import recipe_names
from fedproxy.sealed import read_sealed, write_sealed
from fedproxy.strategies.compression.removal import keep_count

# compression, trainable and its blocks, regularizer, aggregator, fusion, partition (DESIGN's table)
TABLE = {
    "fedproxy": ("block_influence", "lora", "all", "conflict", "h_ties", "plug_in", "by_task"),
    "fedproxy_plus": ("block_influence", "lora", "all", "conflict", "h_ties", "plug_in", "by_task"),
    "zero_shot": ("none", "none", None, "none", "fedavg", "none", "by_task"),
    "centralised": ("none", "lora", "all", "none", "fedavg", "plug_in", "pooled"),
    "local_only": ("block_influence", "lora", "all", "none", "none", "plug_in", "by_task"),
    "offsite_tuning": ("uniform", "lora", "ends", "none", "fedavg", "plug_in", "pooled"),
    "fedot": ("uniform", "lora", "ends", "none", "fedavg", "plug_in", "by_task"),
    "fedbiot": ("uniform", "lora", "last", "proximal", "fedavg", "plug_in", "by_task"),
    "crash": ("cluster", "lora", "centres", "none", "fedavg", "plug_in", "by_task"),
    "proxy_tuning": ("block_influence", "lora", "all", "none", "fedavg", "logit_offset", "by_task"),
    "fedavg_proxy": ("block_influence", "lora", "all", "none", "fedavg", "plug_in", "by_task"),
    "no_conflict": ("block_influence", "lora", "all", "none", "h_ties", "plug_in", "by_task"),
    "no_h_ties": ("block_influence", "lora", "all", "conflict", "fedavg", "plug_in", "by_task"),
    "random_blocks": ("random", "lora", "all", "conflict", "h_ties", "plug_in", "by_task"),
    "no_plug_in": ("block_influence", "lora", "all", "conflict", "h_ties", "none", "by_task"),
}
# LoRA of rank 32 on one 7B block: q, k, v, o 4 * 32 * (4096 + 4096), gate, up, down 3 * 32 * (4096 + 11008)
BLOCK_7B = 32 * (4 * 8192 + 3 * 15104)
TRAINED_7B = {
    ("all", "none"): 32 * BLOCK_7B,
    ("all", "block_influence"): 16 * BLOCK_7B,
    ("all", "random"): 16 * BLOCK_7B,
    ("ends", "uniform"): 4 * BLOCK_7B,
    ("last", "uniform"): 2 * BLOCK_7B,
    ("centres", "cluster"): 16 * BLOCK_7B,
}
TINY = (
    "target.path=asset:tiny-llama", "data.tasks=[tiny_sums,tiny_places]", "data.rows_per_task=8",
    "data.max_input_tokens=96", "compression.calibration.path=asset:tiny-calibration",
    "compression.calibration.rows=8", "compression.calibration.max_tokens=32", "client.batch_size=8",
    "evaluation.limit=2", "evaluation.tasks=[tiny_sums]", "trainer.accelerator=cpu",
)  # fmt: skip


def components(config):
    return (
        config.compression.name, config.trainable.name, getattr(config.trainable, "blocks", None),
        config.regularizer.name, config.aggregator.name, config.fusion.name, config.data.partition.name,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_recipe(tmp_path_factory):
    """Run a recipe at tiny size with overrides and return (report, folder)."""

    def go(name, *overrides, folder=None):
        folder = folder or tmp_path_factory.mktemp(name) / "out"
        fewer = ["healing.rows=32"] if load_config([f"recipe={name}"]).healing.rows else []
        return run(load_config([f"recipe={name}", f"output_dir={folder}", *TINY, *fewer, *overrides])), folder

    return go


def moved_weights(folder):
    """Return the names of the weights in which target and fused model differ."""
    own, new = (load_file(path / "model.safetensors") for path in (resolve("asset:tiny-llama"), folder / "fused"))
    return {name for name in own if not torch.equal(own[name], new[name])}


def block_of(name):
    return int(name.split(".")[2])


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_its_components_go_together(name):
    config = load_config([f"recipe={name}"])
    check_components(config)
    assert config.recipe == name or config.recipe == name.rpartition("/")[2]


@pytest.mark.parametrize("name", TABLE)
def test_a_method_is_its_row_of_the_table_on_smollm2_and_at_paper_scale(name):
    config = load_config([f"recipe={name}"])
    assert components(config) == TABLE[name]
    assert config.method == name
    large = "fedproxy_llama2_7b_heterogeneous" if name == "fedproxy" else f"{name}_llama2_7b"
    paper = load_config([f"recipe=paper/{large}"])
    assert components(paper) == TABLE[name]
    assert paper.method == name
    assert paper.compression.calibration.path == "tatsu-lab/alpaca"
    if name != "zero_shot":
        assert plan([f"recipe=paper/{large}"]).trainable_parameters == TRAINED_7B[TABLE[name][2], TABLE[name][0]]
    if config.compression.name != "none":
        assert config.compression.ratio == 0.27
        assert paper.compression.ratio == 0.5


def test_the_papers_recipes_are_compared_with_each_other_and_fedbiots_in_float32():
    names = [f"paper/{name if name != 'fedproxy' else 'fedproxy_llama2_7b_heterogeneous'}" for name in TABLE]
    names = [name if name.endswith("heterogeneous") else f"{name}_llama2_7b" for name in names]
    check_fair({name: load_config([f"recipe={name}"]) for name in names if "fedbiot" not in name})
    with pytest.raises(
        ConfigError, match=r"target.dtype: .*fedbiot_llama2_7b has 'float32'; .*give target.dtype=VALUE"
    ):
        check_fair({name: load_config([f"recipe={name}"]) for name in names})
    check_fair({name: load_config([f"recipe={name}", "target.dtype=float32"]) for name in names})


@pytest.mark.parametrize("name", TABLE)
def test_same_rows_prompts_budget_and_questions_for_all(name):
    reference, config = (to_dict(load_config([f"recipe={recipe}"])) for recipe in ("fedproxy", name))
    if name == "fedproxy_plus":  # the same rows in twice as many steps
        reference["client"] = {**reference["client"], "batch_size": 8}
    for key in ("target", "client", "server_optimizer", "trainer", "seed", "distillation"):
        assert config[key] == reference[key], key
    for node, free in (("data", {"partition"}), ("evaluation", {"models"})):
        shared = {key for key in reference[node] if key not in free}
        assert {key: config[node][key] for key in shared} == {key: reference[node][key] for key in shared}
    # examples seen: rows times epochs times rounds, whoever owns them
    assert config["federation"] == {**reference["federation"], "rounds": 0 if name == "zero_shot" else 3}
    lora = ("r", "alpha", "dropout", "modules")
    if config["trainable"]["name"] == "lora":
        assert [config["trainable"][key] for key in lora] == [reference["trainable"][key] for key in lora]


@pytest.mark.parametrize("name", TABLE)
def test_no_rounds_leave_the_target_and_one_round_runs_to_the_report(run_recipe, name):
    target = load_model(resolve("asset:tiny-llama"))
    report, folder = run_recipe(name, "federation.rounds=0", "evaluation.models=[]")
    clients = list(map(file_stem, ["tiny_places", "tiny_sums"])) if name == "local_only" else [""]
    for client in clients:
        fused = load_model(folder / "fused" / client)
        if name == "proxy_tuning":
            ids = torch.tensor([[5, 9, 3, 7]])
            assert torch.allclose(fused(ids).logits, target(ids).logits, atol=1e-5)
            fused = fused.target
        if name != "no_plug_in":  # which has no fused model: it ends with the proxy
            assert state_sha256(fused) == state_sha256(target)
    if name == "zero_shot":
        assert report.exposure.disclosed_parameter_share == 0  # nobody is sent anything
        return
    report, _ = run_recipe(name, "federation.rounds=1", "resume=auto", "evaluation.models=[fused]", folder=folder)
    assert report.run.status == "completed"
    assert report.run.method == name
    assert report.scores["fused"]["tiny_sums"]["n"] == 2
    changed = [state_sha256(load_model(folder / "fused" / client)) != state_sha256(target) for client in clients]
    assert all(changed)


@pytest.mark.parametrize(
    ("name", "published", "heals"),
    [
        ("fedproxy_plus", "fedproxy", {"healing", "fusion"}),
        ("paper/fedproxy_plus_llama2_7b", "paper/fedproxy_llama2_7b_heterogeneous", set()),
    ],
)
def test_fedproxy_plus_takes_batches_of_8_and_heals_and_changes_nothing_else(name, published, heals):
    plus, other = (to_dict(load_config([f"recipe={recipe}"])) for recipe in (name, published))
    assert {key for key in plus if plus[key] != other[key]} - {"recipe", "output_dir"} == {"method", "client", *heals}
    assert plus["fusion"] == {**other["fusion"], "mode": "delta" if heals else "replace"}
    steps = [config["client"].pop("batch_size") * config["client"].pop("accumulate") for config in (plus, other)]
    assert steps == [8, 16]
    assert plus["client"] == other["client"]


def test_fedproxy_plus_half_changes_what_its_comment_says_and_sees_the_same_rows():
    plus, half = (to_dict(load_config([f"recipe={name}"])) for name in ("fedproxy_plus", "fedproxy_plus_half"))
    changed = {key for key in plus if plus[key] != half[key]} - {"recipe", "method", "output_dir"}
    assert changed == {"compression", "healing", "distillation", "fusion"}
    assert half["healing"]["rows"] == 0
    assert keep_count(30, half["compression"]["ratio"]) == 15
    assert half["fusion"] == {"name": "plug_in", "mode": "delta", "scale": 1.36}
    check_fair({name: load_config([f"recipe={name}"]) for name in ("fedproxy", "fedproxy_plus_half")})


def test_offsite_tuning_plugs_in_adapter_blocks_alone(run_recipe):
    _, folder = run_recipe("fedot", "federation.rounds=1", "evaluation.models=[]")
    assert {block_of(name) for name in moved_weights(folder)} == {
        0,
        1,
        4,
        5,
    }  # first and last two of six; the emulator between them stays


def test_crash_trains_and_plugs_in_centres_alone(run_recipe):
    _, folder = run_recipe("crash", "federation.rounds=1", "evaluation.models=[]")
    places = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    assert len(places) == 6
    assert len(set(places)) == 5  # 1 of 6 blocks removed, its place filled with a copy
    assert {block_of(name) for name in moved_weights(folder)} == set(places)


def test_proxy_tuning_leaves_a_folder_without_the_targets_weights(run_recipe):
    _, folder = run_recipe("proxy_tuning", "federation.rounds=1", "evaluation.models=[]")
    assert not (folder / "fused/model.safetensors").exists()
    assert json.loads((folder / "fused/config.json").read_text())["untuned"] == "../proxy"
    assert "fedproxy.models import load_model" in (folder / "fused/README.md").read_text()
    fused, ids = load_model(folder / "fused"), torch.tensor([[5, 9, 3, 7]])
    target, tuned, proxy = (model(ids).logits for model in fused.models)
    assert torch.allclose(fused(ids).logits, target + (tuned - proxy), atol=1e-5)
    assert not torch.equal(tuned, proxy)


def test_whole_blocks_are_trained_and_plugged_in(run_recipe):
    report, folder = run_recipe("fedot", "trainable.name=full", "trainable.blocks=last", "trainable.last=1",
                                "federation.rounds=1", "evaluation.models=[]")  # fmt: skip
    own = load_file(resolve("asset:tiny-llama") / "model.safetensors")
    assert moved_weights(folder) == {name for name in own if ".layers.5." in name}
    assert report.cost.trainable_parameters == sum(own[name].numel() for name in own if ".layers.5." in name)
    assert (folder / "adapter/trained_weights.safetensors").is_file()


def test_a_scale_is_chosen_on_public_text_and_reported(run_recipe):
    report, _ = run_recipe("fedavg_proxy", "fusion.name=task_vector", "fusion.candidates=[0.0,1.0]", "fusion.rows=4",
                           "federation.rounds=1", "evaluation.models=[]")  # fmt: skip
    assert any("chosen on public text without training: scale" in note for note in report.notes)


def test_a_users_fusion_module_is_named_in_the_recipe(run_recipe, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/baselines.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "half_way.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    report, folder = run_recipe("fedavg_proxy", "plugins=[half_way]", "fusion.name=half_way", "federation.rounds=1",
                                "evaluation.models=[]")  # fmt: skip
    assert report.run.status == "completed"
    assert state_sha256(load_model(folder / "fused")) != state_sha256(load_model(resolve("asset:tiny-llama")))


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("fedavg_proxy", ["trainable.name=full", "target.dtype=bfloat16"], r"full trains the proxy's own weights"),
        ("fedavg_proxy", ["trainable.name=full", "federation.space=product"], r"^federation.space=product needs one"),
        ("fedavg_proxy", ["trainable.name=bias", "aggregator.name=ffa_lora"], r"^aggregator.name=ffa_lora needs one"),
        ("fedavg_proxy", ["trainable.name=none"], r"trains nothing in 3 rounds; use federation.rounds=0"),
        ("local_only", ["federation.space=product"], r"federation.space=product says how clients are merged, and"),
        ("fedproxy", ["aggregator.name=none"], r"regularizer.name: 'conflict' needs the conflict between clients"),
        ("fedavg_proxy", ["trainable.name=bias"], r"trainable.name=bias: the proxy's blocks have no bias \(llama\)"),
    ],
)  # fmt: skip
def test_components_that_do_not_go_together_end_in_one_line(run_recipe, recipe, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run_recipe(recipe, *overrides, "evaluation.models=[]")
    assert "\n" not in str(caught.value)


def test_logits_over_another_vocabulary_are_refused_before_any_client_trains(run_recipe):
    _, folder = run_recipe("proxy_tuning", "federation.rounds=0", "evaluation.models=[]")
    path = folder / "proxy/tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(words))
    facts = folder / "server/facts.json"  # the run itself had written it so
    known = read_sealed(facts)
    write_sealed(facts, {**known, "files": {**known["files"], "proxy/tokenizer.json": file_sha256(path)}})
    with pytest.raises(FedProxyError, match=r"target and proxy have different vocabularies \(token"):
        run_recipe("proxy_tuning", "federation.rounds=1", "resume=auto", "evaluation.models=[]", folder=folder)
    assert not (folder / "checkpoints/round_0001").exists()

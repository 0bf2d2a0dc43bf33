"""fedproxy.api gives what the commands give, to the byte, and refuses what they refuse, in the same words."""

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedproxy.evaluate
from fedproxy import api, fit
from fedproxy.config import load_config
from fedproxy.errors import CheckpointError, ClientError, ConfigError, DataError, ModelError
from fedproxy.pipeline.data import public_texts
from fedproxy.reporting import RunReport

SMALL = {
    "data": {"rows_per_task": 16},
    "client.batch_size": 8,
    "federation.rounds": 1,
    "evaluation": {"limit": 4, "models": ["target", "fused"]},
}
WORDS = [
    "data.rows_per_task=16", "client.batch_size=8", "federation.rounds=1", "evaluation.limit=4",
    "evaluation.models=[target,fused]",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A small run."""
    return api.fit("fedproxy_tiny", SMALL, output_dir=tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def target():
    return api.load("asset:tiny-llama")


def files(folder):
    """What a run made for others, by path; a model card has its date."""
    parts = (Path(folder, name) for name in ("proxy", "fused", "adapter", "rows"))
    found = (path for part in parts for path in part.rglob("*") if path.is_file() and path.name != "README.md")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_fit_leaves_the_bytes_of_the_command(report, tmp_path, capsys):
    fit.main(["recipe=fedproxy_tiny", *WORDS, f"output_dir={tmp_path}/run"])
    assert capsys.readouterr().out.startswith(f"{report}\nreport: {tmp_path}/run/report.md")
    ours, theirs = files(report.path), files(tmp_path / "run")
    assert ours == theirs
    assert {"proxy/model.safetensors", "fused/model.safetensors"} <= ours.keys()
    assert report.scores == RunReport.load(tmp_path / "run").scores


def test_a_report_shows_itself_and_knows_its_folder(report):
    assert report.run.status == "completed"
    assert [line.round for line in report.rounds] == [1]
    assert str(report).startswith("mean acc_norm over 4 tasks")
    page = report._repr_html_()
    assert page.startswith('<iframe srcdoc="&lt;!')
    assert page.count('"') == 8  # four attributes: nothing of the page ends one
    assert 'sandbox=""' in page
    assert RunReport.load(report.path).to_dict() == report.to_dict()
    assert RunReport.load(report.path).path == report.path
    content = json.loads((report.path / "report.json").read_text())
    assert "path" not in content
    assert RunReport.from_dict({**content, "path": "/etc"}).path is None
    assert replace(report, path=None)._repr_html_() is None
    assert replace(report, path=report.path / "server")._repr_html_() is None


def test_a_finished_run_is_only_read(report, capsys):
    again = api.fit("fedproxy_tiny", SMALL, output_dir=report.path, resume="auto")
    assert again.to_dict() == report.to_dict()
    assert "this run is finished; nothing left to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"client.lr": -1}, ["client.lr=-1"]),
        ({"client": {"lr": "fast"}}, ["client.lr=fast"]),
        ({"aggregator": {"name": "h_tie"}}, ["aggregator.name=h_tie"]),
        ({"data.tasks": "tiny_sums"}, ["data.tasks=tiny_sums"]),
        ({"plugins": ["os"]}, ["plugins=[os]"]),
        ({"output_dir": "${oc.env:HOME}"}, ["output_dir=${oc.env:HOME}"]),
        ({"overwrite": True, "resume": "auto"}, ["overwrite=true", "resume=auto"]),
        ({"federation": {}, "federaton.rounds": 1}, ["federaton.rounds=1"]),
    ],
)
def test_what_the_command_refuses_is_refused_in_its_words(overrides, words):
    with pytest.raises(ConfigError) as theirs:
        load_config(["recipe=fedproxy_tiny", *words])
    for call in (api.fit, api.compress_recipe):
        with pytest.raises(ConfigError) as ours:
            call("fedproxy_tiny", overrides)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"client.lr": object()},
            "client.lr must be a text, a number, True, False, None, a path, or a list",
        ),
        ({"client": {"l=r": 1}}, "client.'l=r': a key must not be empty or hold a =; correct the key"),
        ({"recipe": "fedot"}, "overrides: recipe is the first argument of the call; take it out"),
    ],
)
def test_what_no_word_could_say_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        api.fit("fedproxy_tiny", overrides)


def test_texts_come_as_they_are(tmp_path):
    """A name that YAML would take for a number, a quote, and letters beyond the first plane."""
    for name in ("2026_11", "on", 'a"b', "ward 😀"):
        config = load_config(api._words("fedproxy_tiny", {"output_dir": tmp_path / name, "method": name}, {}))
        assert config.output_dir == f"{tmp_path}/{name}"
        assert config.method == name


def test_a_rule_of_a_notebooks_cell_can_be_named(tmp_path):
    @dataclass(frozen=True)
    class Half(api.Aggregator, name="half_of_the_mean"):
        def combine(self, deltas, weights):
            return deltas.mean(dim=0) / 2

    report = api.fit(
        "fedproxy_tiny",
        {**SMALL, "evaluation.models": []},
        aggregator={"name": "half_of_the_mean"},
        output_dir=tmp_path / "run",
    )
    assert report.run.status == "completed"
    with pytest.raises(ConfigError, match=r"unknown aggregator 'half_of_the_mea'; did you mean 'half_of_the_mean'\?"):
        api.compare(["fedproxy_tiny"], aggregator={"name": "half_of_the_mea"}, output_dir=tmp_path / "compared")


def test_compress_cuts_the_proxy_of_a_run(report, target):
    config = load_config(["recipe=fedproxy_tiny", f"output_dir={report.path}"])
    texts = public_texts(config.compression.calibration, (), rows=32, seed=config.seed)
    options = {"name": "block_influence", "ratio": 0.5, "calibration": {"max_tokens": 64}}
    proxy, kept = api.compress(*target, texts, options), api.Proxy.load(report.path)
    assert proxy.layer_map == kept.layer_map
    assert len(proxy.layer_map.proxy_to_target) == 3
    ours, theirs = proxy.model.state_dict(), kept.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_compress_recipe_leaves_the_proxy_that_fit_makes(report, tmp_path):
    made = api.compress_recipe("fedproxy_tiny", SMALL, output_dir=tmp_path / "proxy")
    assert made.path == tmp_path / "proxy"
    assert made.fidelity.kl > 0
    weights = "proxy/model.safetensors"
    assert (made.path / weights).read_bytes() == (report.path / weights).read_bytes()


def test_a_saved_proxy_comes_back_and_names_no_target(target, tmp_path):
    proxy = api.compress(*target, compressor={"name": "uniform", "ratio": 0.5, "first": 1, "last": 1})
    assert proxy.save(tmp_path / "cut") == tmp_path / "cut/proxy"
    assert (tmp_path / "cut/server/layer_map.json").stat().st_mode & 0o077 == 0  # for the server alone
    again = api.Proxy.load(tmp_path / "cut")
    assert again.layer_map == proxy.layer_map
    assert all(map(torch.equal, again.model.state_dict().values(), proxy.model.state_dict().values()))
    assert not any(b"tiny-llama" in path.read_bytes() for path in (tmp_path / "cut/proxy").iterdir())
    with pytest.raises(CheckpointError, match="cut/proxy is there already; choose another folder"):
        proxy.save(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"layer_map.json"):
        api.Proxy.load(tmp_path)


def test_fuse_gives_the_fused_model_of_a_run(report, target):
    model, tokenizer = target
    proxy = api.Proxy.load(report.path)
    lora = api.Trainable.by_name("lora")(r=8, alpha=16).attach(copy.deepcopy(proxy.model))
    lora.load_state(load_file(report.path / "adapter/adapter_model.safetensors"))
    tuned = {**proxy.model.state_dict(), **lora.merged_weights()}
    fused = api.fuse(model, proxy, tuned)
    theirs = api.load(report.path / "fused")[0].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in fused.state_dict().items())
    assert not all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    scores = api.evaluate(fused, tokenizer, api.Questions(["tiny_sums"], limit=4), progress=False).scores
    assert scores["tiny_sums"]["acc"] == report.scores["fused"]["tiny_sums"]["acc"]


def test_fuse_takes_texts_where_an_option_is_chosen_by_them(target):
    proxy = api.compress(*target, compressor={"name": "uniform", "ratio": 0.5, "first": 1, "last": 1})
    tuned = {name: value + 1e-3 for name, value in proxy.model.state_dict().items()}
    choice = {"name": "task_vector", "candidates": [0.0], "rows": 2}
    fused = api.fuse(target[0], proxy, tuned, choice, texts=["How much is one and one", "two"])
    # the only candidate is 0: nothing moves
    assert all(map(torch.equal, fused.state_dict().values(), target[0].state_dict().values()))
    with pytest.raises(ConfigError, match=r"fusion.name=task_vector chooses its options by public text; give texts="):
        api.fuse(target[0], proxy, tuned, choice)


def test_aggregate_merges_by_name_options_or_instance():
    updates = [
        api.ClientUpdate("a", {"w": torch.tensor([4.0, -2.0])}, num_examples=1),
        api.ClientUpdate("b", {"w": torch.tensor([0.0, 2.0])}, num_examples=3),
    ]
    # rows 1:3: (4 + 0) / 4 and (-2 + 6) / 4
    assert api.aggregate(updates).delta["w"].tolist() == [1.0, 1.0]
    uniform = {"name": "fedavg", "weighting": "uniform"}
    assert api.aggregate(updates, uniform).delta["w"].tolist() == [2.0, 0.0]
    rule = api.Aggregator.by_name("fedavg")(weighting="uniform")
    assert api.aggregate(updates, rule).delta["w"].tolist() == [2.0, 0.0]
    # Eq (7): one of two has a sign in the first coordinate, in the second they are split
    assert api.aggregate(updates, "median").conflict["w"].tolist() == pytest.approx([0.5, 1.0])
    with pytest.raises(ConfigError, match=r"aggregator.name: unknown aggregator 'fedavgg'; did you mean 'fedavg'\?"):
        api.aggregate(updates, "fedavgg")
    with pytest.raises(ConfigError, match=r"aggregator.density must be in \(0, 1\], got 1.5"):
        api.aggregate(updates, {"name": "ties", "density": 1.5})
    with pytest.raises(ClientError, match="at least one client update"):
        api.aggregate([])


def test_evaluate_gives_the_scores_of_the_command(target, tmp_path, capsys):
    (tmp_path / "ward.jsonl").write_text('{"prompt": "a", "target": "b"}\n{"prompt": "c", "target": "d"}\n')
    words = ["model=asset:tiny-llama", "tasks=[tiny_sums]", "limit=6", "num_fewshot=1", "device=cpu"]
    own = [f"files.ward={tmp_path}/ward.jsonl", "max_new_tokens=2", f"output_dir={tmp_path}/found"]
    fedproxy.evaluate.main([*words, *own])
    theirs = json.loads((tmp_path / "found/scores.json").read_text())["scores"]
    asked = api.Questions(
        ["tiny_sums"], files={"ward": str(tmp_path / "ward.jsonl")}, max_new_tokens=2, limit=6, num_fewshot=1
    )
    found = api.evaluate(*target, asked, progress=False)
    assert {**found.scores, "mean": found.mean} == theirs
    assert found.scores["ward"]["n"] == 2
    capsys.readouterr()


def test_compare_gives_the_report_of_the_command(tmp_path, monkeypatch):
    import fedproxy.compare

    monkeypatch.chdir(tmp_path)
    methods = {
        "mean": {"recipe": "fedproxy_tiny", "aggregator.name": "fedavg"},
        "median": {"recipe": "fedproxy_tiny", "aggregator.name": "median"},
    }
    small = {**SMALL, "evaluation.models": ["target", "fused"], "data.tasks": ["tiny_sums", "tiny_places"]}
    found = api.compare(methods=methods, seeds=[1], overrides=small, output_dir="ours", reference="mean")
    assert found.failed == []
    assert str(found).startswith("| method")
    assert found._repr_html_().startswith("<iframe ")
    words = [f"methods={json.dumps(methods)}", "seeds=[1]", "output_dir=theirs", "reference=mean", *WORDS]
    fedproxy.compare.main([*words, "data.tasks=[tiny_sums,tiny_places]"])
    told = [json.loads(Path(name, "comparison.json").read_text())["analysis"]["methods"] for name in ("ours", "theirs")]
    ours, theirs = ([{**method, "cost": None} for method in methods] for methods in told)  # seconds are in the cost
    assert ours == theirs
    assert [method["label"] for method in ours] == ["mean", "median"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: api.load("asset:tiny-lama"), Exception, "did you mean 'tiny-llama'"),
        (lambda m, t: api.compress(m, t, "one text"), ConfigError, "texts must be a list of texts, got str; write"),
        (lambda m, t: api.compress(m, t), DataError, "token"),
        (lambda m, t: api.compress(m, t, ["a"], "angulr"), ConfigError, "unknown compression 'angulr'; did you mean"),
        (lambda m, t: api.evaluate(m, t, "tiny_sums"), ConfigError, "questions must be a list of texts, got str"),
        (lambda m, t: api.evaluate(m, t, []), ConfigError, "tasks is missing; write, for example"),
        (lambda m, t: api.compare("fedproxy_tiny"), ConfigError, "recipes must be a list of texts, got str; write"),
        (lambda m, t: api.compare(Path("a.yaml")), ConfigError, "recipes must be a list of texts, got Pos"),
        (lambda m, t: api.compare(["fedproxy_tiny"], seeds=42), ConfigError, "seeds must be a list of .*, got 42"),
        (lambda m, t: api.fit("fedproxy_tiny", ["seed=1"]), ConfigError, "overrides must be a Mapping, got list"),
        (lambda m, t: api.load(None), ConfigError, "path must be a str or Path, got NoneType"),
        (lambda m, t: api.Proxy.load(None), ConfigError, "folder must be a str or Path, got NoneType"),
        (lambda m, t: api.compress("m", t, ["a"]), ConfigError, "target must be a PreTrainedModel, got str"),
        (lambda m, t: api.compress(m, t, [b"a"]), ConfigError, "texts must be a list of texts, got bytes"),
        (lambda m, t: api.evaluate("m", t, ["tiny_sums"]), ConfigError, "model must be a Module, got str"),
        (lambda m, t: api.evaluate(m, None, ["tiny_sums"]), ConfigError, "tokenizer must be a PreTrainedTokenizerB"),
        (lambda m, t: api.fuse(m, m, m), ConfigError, "proxy must be a Proxy, got LlamaForCausalLM"),
        (lambda m, t: api.aggregate([{}]), ConfigError, "updates must be a list of ClientUpdates, got dict"),
        (lambda m, t: api.Questions("tiny_sums"), ConfigError, "tasks must be a list of names, got the text"),
    ],
)
def test_bad_input_is_one_line(target, call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(*target)
    assert isinstance(raised.value, api.FedProxyError)
    assert "\n" not in str(raised.value)


def test_texts_may_be_read_once(target):
    method = {"name": "block_influence", "ratio": 0.5}
    once, listed = (api.compress(*target, texts, method) for texts in (iter(["a b c"]), ["a b c"]))
    assert once.layer_map == listed.layer_map


def test_fuse_refuses_what_does_not_belong_together(target, make_model):
    model, tokenizer = target
    proxy = api.compress(model, tokenizer, compressor={"name": "uniform", "ratio": 0.5, "first": 1, "last": 1})
    with pytest.raises(ModelError, match="tuned must be a model or its state dict, got Linear; merge an"):
        api.fuse(model, proxy, torch.nn.Linear(1, 1))
    with pytest.raises(ModelError, match=r"the proxy after tuning has no model\.layers\.0"):
        api.fuse(model, proxy, {})
    with pytest.raises(ModelError, match=r"the proxy has no model\.layers\.\d.*, which tuned holds; give the tuned"):
        api.fuse(model, proxy, model)  # the blocks of another model would be taken for the proxy's
    name, weight = next(iter(proxy.model.state_dict().items()))
    with pytest.raises(ModelError, match=f"{name} of the proxy after tuning is not finite"):
        api.fuse(model, proxy, {name: weight * math.nan})
    with pytest.raises(ModelError, match=f"the proxy after tuning has no {name} of shape"):
        api.fuse(model, proxy, {name: weight.numpy()})
    with pytest.raises(ModelError, match="are not those that were compressed"):
        api.fuse(make_model("llama"), proxy, proxy.model)


def test_all_that_is_public_is_there():
    assert sorted(api.__all__) == api.__all__
    assert all(getattr(api, name).__doc__ for name in api.__all__)

"""`python -m fedproxy.compress`: what it leaves, that fit goes on from it, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    ReformerConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError, ConfigError, DataError, ModelError
from fedproxy.models import check_tokenizer, load_model, state_sha256
from fedproxy.pipeline.data import client_rows
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.run import compress_only, run
from fedproxy.reporting import RunReport
from fedproxy.strategies.compression.block_influence import BlockInfluence
from tests.models.test_anonymity import telling_target
from tests.strategies.compression.architectures import small_model

SMALL = (
    "recipe=fedproxy_tiny",
    "data.rows_per_task=16",
    "client.batch_size=8",
    "federation.rounds=1",
    "evaluation.models=[]",
)


def compress(folder, *overrides):
    return compress_only(load_config([*SMALL, f"output_dir={folder}", *overrides]))


def fit(folder, *overrides):
    return run(load_config([*SMALL, f"output_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress") / "out"
    return compress(folder), folder


def test_it_leaves_a_proxy_a_map_a_plot_and_a_report(compressed):
    report, folder = compressed
    layer_map = json.loads((folder / "server/layer_map.json").read_text())
    assert len(layer_map["proxy_to_target"]) == 3
    assert layer_map["target_sha256"] == state_sha256(load_model(resolve("asset:tiny-llama")))
    proxy = AutoModelForCausalLM.from_pretrained(folder / "proxy")
    assert proxy.config.num_hidden_layers == 3
    assert (folder / "block_influence.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (folder / "rounds.jsonl").exists()
    saved = RunReport.load(folder)
    assert saved.fidelity == report.fidelity
    assert saved.fidelity.kl > 0
    assert saved.fidelity.tokens > 100
    assert saved.fidelity.proxy_perplexity > 1
    assert (saved.cost.target_parameters, saved.cost.proxy_parameters) == (
        report.cost.target_parameters,
        sum(parameter.numel() for parameter in proxy.parameters()),
    )
    assert len(saved.compression.scores) == 6
    assert list(saved.compression.kept) == layer_map["proxy_to_target"]


def test_the_pages_show_fidelity_and_what_was_removed(compressed):
    _, folder = compressed
    kept = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    removed = ", ".join(str(block) for block in range(6) if block not in kept)
    page = (folder / "report.html").read_text()
    assert "Fidelity of the proxy" in page
    assert f"Removed: {removed}." in page
    assert "| perplexity" in (folder / "report.md").read_text()


def test_nothing_in_the_proxy_names_the_target(compressed):
    _, folder = compressed
    secrets = [b"tiny-llama", b"tiny_llama", b"proxy_to_target", b"base_model", b"/cache/"]
    secrets.append(json.loads((folder / "server/layer_map.json").read_text())["target_sha256"].encode())
    for path in (folder / "proxy").rglob("*"):
        assert not [secret for secret in secrets if secret in path.read_bytes()], path


def test_no_proxy_tells_of_a_target_that_has_templates_code_and_notes(tmp_path):
    target = telling_target(tmp_path / "secret-llm")
    compress(tmp_path / "out", f"target.path={target}", "distillation.steps=1", "distillation.rows=16")
    proxies = [tmp_path / "out" / "proxy", tmp_path / "out" / "server" / "proxy_undistilled"]
    files = [path for proxy in proxies for path in proxy.rglob("*") if path.is_file()]
    assert len(files) == 12
    words = [b"acmecorp", b"secret", b"auto_map", b"model_id", b"chat_template"]
    for path in files:
        content = path.read_bytes().lower()
        assert not [word for word in words if word in content], path


def test_fit_goes_on_from_it_and_compress_does_not_take_its_report(compressed):
    _, folder = compressed
    before = state_sha256(load_model(folder / "proxy"))
    report = run(load_config([*SMALL, "resume=auto", f"output_dir={folder}"]))
    assert len(report.rounds) == 1
    assert report.fidelity is not None
    assert state_sha256(load_model(folder / "proxy")) == before
    kept = {name: (folder / name).read_bytes() for name in ("report.json", "config.yaml")}
    message = r"holds a run that is past compression, .*; go on with it by python -m fedproxy.fit, or compress into an"
    with pytest.raises(ConfigError, match=message):
        compress(folder, "resume=auto")
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_compress_goes_on_with_a_compression_that_was_cut_short(tmp_path, monkeypatch):
    from fedproxy.pipeline.stages.evaluate import Evaluate

    def stop(*_):
        raise DataError("stopped")

    compress(tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluate, "do", stop)
        with pytest.raises(DataError, match="stopped"):
            compress(tmp_path / "out", "resume=auto")
    assert (tmp_path / "out" / "proxy" / "model.safetensors").is_file()  # what was there before stays
    assert compress(tmp_path / "out", "resume=auto").fidelity.kl > 0


@pytest.mark.parametrize("compressor", ["name=random", "name=ffn_width", "name=cluster compression.share=true"])
def test_other_compressors_and_another_family_go_through_the_same_door(tmp_path, compressor):
    model = small_model("gpt2" if "ffn" in compressor else "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(resolve("asset:tiny-llama"))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "secret-llm")
    tokenizer.save_pretrained(tmp_path / "secret-llm")
    words = [f"compression.{word}".replace("compression.compression", "compression") for word in compressor.split()]
    words += ["trainable.modules=[c_attn]"] if "ffn" in compressor else []
    report = compress(tmp_path / "out", f"target.path={tmp_path / 'secret-llm'}", *words)
    assert report.fidelity.kl > 0
    assert len(report.compression.scores) == 6  # taken for the plot, although the rule needs none
    for path in (tmp_path / "out" / "proxy").rglob("*"):
        assert b"secret" not in path.read_bytes(), path
    share = report.exposure.disclosed_parameter_share
    assert share < 1
    proxy = load_model(tmp_path / "out" / "proxy")
    assert proxy.config.num_hidden_layers == (3 if "random" in compressor else 6)


def refuse(error, message, folder, *overrides):
    with pytest.raises(error, match=message) as caught:
        compress(folder, *overrides)
    assert "\n" not in str(caught.value)
    assert not folder.exists(), sorted(folder.rglob("*"))


def test_bad_options_are_one_line_before_anything_is_written(tmp_path):
    folder = tmp_path / "out"
    refuse(ConfigError, r"^compression.ratio must be in \[0, 1\), got 1.0$", folder, "compression.ratio=1.0")
    refuse(
        ConfigError,
        r"^compression.ratio=0.99 of the parameters would remove all 6 blocks",
        folder,
        "compression.ratio=0.99",
        "compression.ratio_of=parameters",
    )
    nothing = r"^compression.ratio=0.1 removes no block; give at least 0.1667, or choose compression.name=none"
    refuse(ConfigError, nothing, folder, "compression.ratio=0.1")
    refuse(
        ConfigError,
        r"^compression.keep names block 6, but the target has blocks 0 to 5$",
        folder,
        "compression.keep=[0,6]",
    )
    refuse(ConfigError, r"^compression.keep must be ascending block indices", folder, "compression.keep=[2,1]")
    refuse(ConfigError, r"did you mean 'angular'", folder, "compression.name=angullar")


def test_a_model_that_is_no_decoder_is_one_line(tmp_path):
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    refuse(ModelError, r"encoder-decoder model \(t5\)", tmp_path / "out", f"target.path={tmp_path / 't5'}")


def test_a_model_that_is_not_causal_is_one_line(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve("asset:tiny-llama"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    message = r"^BertLMHeadModel is not causal: .* later tokens; give another target.path, a decoder-only causal LM$"
    words = (f"target.path={tmp_path / 'bert'}", "compression.name=none", "trainable.modules=[query]")
    refuse(ModelError, message, tmp_path / "out", *words)


def test_what_fit_would_refuse_compress_refuses_before_it_works(tmp_path, begun):
    for error, message, words in (
        (ConfigError, "federation.clients_per_round must be at most the 4", ("federation.clients_per_round=5",)),
        (ConfigError, "blocks have no linear layer 'no_such'", ("trainable.modules=[no_such]",)),
        (ConfigError, "trainer.precision=bf16-true converts", ("trainer.precision=bf16-true",)),
    ):
        refuse(error, message, tmp_path / "out", *words)
        with pytest.raises(error, match=message):
            plan([*SMALL, *words])
    assert not begun


def test_a_family_that_refuses_its_own_configuration_is_one_line(tmp_path):
    ReformerConfig().save_pretrained(tmp_path / "llm")  # "make sure that is_decoder=True", by an assert
    save_file({"a": torch.zeros(1)}, tmp_path / "llm/model.safetensors")
    message = r"^target.path=.*llm: a model of type reformer cannot be built: .*; give a decoder-only causal LM$"
    refuse(ModelError, message, tmp_path / "out", f"target.path={tmp_path / 'llm'}")


def test_a_tokenizer_of_another_vocabulary_is_one_line(tmp_path):
    small_model("llama").save_pretrained(tmp_path / "llm")  # 61 tokens
    AutoTokenizer.from_pretrained(resolve("asset:tiny-llama")).save_pretrained(tmp_path / "llm")
    message = r"llm: the tokenizer has tokens up to id \d+, the model's vocabulary 61 entries; put the model's own"
    refuse(ModelError, message, tmp_path / "out", f"target.path={tmp_path / 'llm'}")


def words_only(count):
    """Return a tokenizer of ``count`` whole words."""
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(count)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")


def test_a_tokenizer_of_a_far_smaller_vocabulary_is_one_line(tmp_path):
    small_model("llama").save_pretrained(tmp_path / "llm")  # 61 tokens
    words_only(4).save_pretrained(tmp_path / "llm")
    message = r"llm: the tokenizer has 4 tokens, under 90% of the model's vocabulary of 61; put the model's own"
    refuse(ModelError, message, tmp_path / "out", f"target.path={tmp_path / 'llm'}")


def test_a_vocabulary_may_be_padded_but_not_leave_out_special_tokens():
    model = small_model("llama")
    check_tokenizer(model, words_only(55), "llm")  # 55 of 61 are 90.2 %
    with pytest.raises(
        ModelError, match=r"^llm: the tokenizer has 54 tokens, under 90% of the model's vocabulary of 61"
    ):
        check_tokenizer(model, words_only(54), "llm")
    model.config.eos_token_id, model.config.pad_token_id = [2, 55], -1  # -1 stands for none in old checkpoints
    message = r"^llm: the model's eos_token_id is 55, and the tokenizer's tokens end at id 54; put the model's own"
    with pytest.raises(ModelError, match=message):
        check_tokenizer(model, words_only(55), "llm")
    check_tokenizer(model, words_only(56), "llm")


def test_calibration_text_without_text_is_one_line(tmp_path):
    texts = tmp_path / "empty.jsonl"
    texts.write_text("")
    refuse(DataError, r"empty.jsonl", tmp_path / "out", f"compression.calibration.path={texts}")
    texts.write_text('{"text": "the only one there is"}\n')
    few = (f"compression.calibration.path={texts}", "compression.calibration.rows=1")
    refuse(DataError, r"holds 1 texts and compression reads 1; add some", tmp_path / "out", *few)


@pytest.fixture
def begun(monkeypatch):
    """Stop where compression begins to compute, and note that it did."""
    calls = []

    def score(self, decoder, calibration):
        calls.append(self)
        raise InterruptedError

    monkeypatch.setattr(BlockInfluence, "score", score)
    return calls


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("distillation.rows=201",), DataError, r"tiny-calibration holds 200 texts, 201 are asked for; ask for fewer"),
        (
            ("distillation.cache_teacher=true", "distillation.top_k=100000"),
            ConfigError,
            r"^distillation.top_k must be in \[1, \d+\], the target's vocabulary, got 100000$",
        ),
        (
            ("target.dtype=bfloat16",),
            ConfigError,
            r"^distillation.train=full trains the proxy's own weights, and in bfloat16 .*; use distillation.train=lora",
        ),
    ],
)
def test_what_distillation_lacks_is_said_before_compressing(tmp_path, begun, words, error, message):
    refuse(error, message, tmp_path / "out", "distillation.steps=2", *words)
    with pytest.raises(error, match=message):
        run(load_config([*SMALL, f"output_dir={tmp_path / 'fit'}", "distillation.steps=2", *words]))
    assert not begun


def test_text_that_healing_lacks_is_missed_before_compressing(tmp_path, begun):
    message = r"tiny-calibration holds 200 texts, 201 are asked for; ask for fewer"
    refuse(DataError, message, tmp_path / "out", "healing.rows=201")
    message = r"tiny-calibration holds 200 texts and compression reads 200; add some"
    refuse(DataError, message, tmp_path / "out", "healing.rows=200")
    assert not begun


@pytest.mark.parametrize("name", ["ffn_width", "none", "{name: cluster, share: true}"])
def test_healing_where_no_block_is_gone_is_refused_before_compressing(tmp_path, begun, name):
    option = f"compression={name}" if name.startswith("{") else f"compression.name={name}"
    message = r"^healing\.rows needs a compressor that removes whole blocks; leave it out, or choose another$"
    refuse(ConfigError, message, tmp_path / "out", "healing.rows=8", option)
    with pytest.raises(ConfigError, match=message):
        run(load_config([*SMALL, f"output_dir={tmp_path / 'fit'}", "healing.rows=8", option]))
    assert not begun


def test_text_that_fidelity_lacks_is_missed_before_compressing_and_only_by_who_measures_it(tmp_path, begun):
    words = ("distillation.steps=2", "distillation.rows=200")  # all that there are
    message = r"tiny-calibration holds 200 texts and compression reads 200; add some"
    refuse(DataError, message, tmp_path / "out", *words)
    assert not begun
    with pytest.raises(InterruptedError):
        run(load_config([*SMALL, f"output_dir={tmp_path / 'fit'}", *words]))
    assert begun


@pytest.mark.parametrize("name", ["proxy", "layer_map.json", "block_influence.png"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    def full(self, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        os.rename(self, target)

    def full_replace(source, target):
        full(source, target)

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(os, "replace", full_replace)
    refuse(CheckpointError, r"(cannot be written|cannot write).*No space left on device", tmp_path / "out")


def full_config(monkeypatch):
    def full(source, target):
        if Path(target).name == "config.yaml":
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", full)


def test_a_disk_full_at_the_first_file_leaves_nothing(tmp_path, monkeypatch):
    full_config(monkeypatch)
    refuse(CheckpointError, r"cannot write .*out/config.yaml \(No space left on device", tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot write"):  # fit claims its folder in the same way
        run(load_config([*SMALL, f"output_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_left_empty_and_can_be_used_again(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    with monkeypatch.context() as patch:
        full_config(patch)
        with pytest.raises(CheckpointError, match="cannot write"):
            compress(folder)
    assert not list(folder.iterdir())
    with pytest.raises(DataError, match="every text is a client's row"):
        compress(folder, f"compression.calibration.path={clients_rows(tmp_path)}", "compression.calibration.rows=1")
    assert not list(folder.iterdir())
    assert compress(folder).fidelity.kl > 0


def clients_rows(tmp_path):
    config = load_config([*SMALL])
    rows = [row for own in client_rows(config.data, seed=config.seed).values() for row in own]
    path = tmp_path / "owned.jsonl"
    path.write_text("".join(json.dumps({"text": row.prompt + row.target}) + "\n" for row in rows[:2]))
    return path


def test_overwrite_deletes_the_old_run_only_when_the_texts_are_good(tmp_path):
    folder, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    compress(folder)
    before = sorted(folder.rglob("*"))
    bad = ["", '{"text": "  "}\n', '{"txt": "a"}\n', '{"text": "the only one"}\n']
    for content in bad:
        texts.write_text(content)
        words = ("overwrite=true", f"compression.calibration.path={texts}", "compression.calibration.rows=1")
        with pytest.raises(DataError, match=r"texts\.jsonl"):
            compress(folder, *words)
        assert sorted(folder.rglob("*")) == before, content
    for content in bad[:3]:
        texts.write_text(content)
        with pytest.raises(DataError, match=r"texts\.jsonl"):
            fit(folder, *words)
        assert sorted(folder.rglob("*")) == before, content
    for command in (compress, fit):
        with pytest.raises(DataError, match="every text is a client's row"):
            command(folder, "overwrite=true", f"compression.calibration.path={clients_rows(tmp_path)}", words[-1])
        assert sorted(folder.rglob("*")) == before
    compress(folder, "overwrite=true")
    assert sorted(folder.rglob("*")) == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("do not lose")
    with pytest.raises(ConfigError, match="already contains files that are not a run"):
        compress(tmp_path / "out", "overwrite=true")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "do not lose"

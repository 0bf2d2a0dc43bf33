"""What a client's checkpoint may not say, and that nothing else is lost with it."""

import json
import shutil

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError
from fedproxy.models import load_model, load_tokenizer, save_model
from fedproxy.models.anonymity import origin_names
from tests.strategies.compression.architectures import FAMILIES, small_model


def telling_target(folder):
    """Write a target whose files tell in many places who made it, and return its folder."""
    shutil.copytree(resolve("asset:tiny-llama"), folder)
    (folder / "chat_template.jinja").write_text("You are ACMECORP's helper. {{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("ACMECORP's tools: {{ tools }}")
    edit(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "acmecorp/secret-llm--modeling.SecretForCausalLM"},
        vendor="acmecorp corporation",
        lineage={"parent": ["acmecorp/older"]},
        secret_llm_revision=3,
        attention_sink=7,
        id2label={"0": "acmecorp", "1": "other"},
    )
    edit(folder / "generation_config.json", prompt_prefix="acmecorp", stop_strings=["secret-llm:"], top_k=7)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["acmecorp/secret-llm--tokenization.Secret", None]},
        model_id="acmecorp/secret-llm",
        padding_side="left",
    )
    return folder


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def save(target, folder):
    save_model(load_model(target), load_tokenizer(target), folder, card="a card", anonymous=True)
    return folder


def test_nothing_of_the_targets_name_templates_and_notes_stays(tmp_path):
    target = telling_target(tmp_path / "secret-llm")
    plain = tmp_path / "plain"
    save_model(load_model(target), load_tokenizer(target), plain, card="")
    written = b"".join(path.read_bytes().lower() for path in plain.rglob("*") if path.is_file())
    assert b"acmecorp" in written  # transformers does write it all
    assert (plain / "additional_chat_templates" / "tools.jinja").is_file()
    proxy = save(target, tmp_path / "proxy")
    assert {path.name for path in proxy.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    words = [b"acmecorp", b"secret", b"auto_map", b"model_id", b"chat_template", b"lineage", b"transformers_version"]
    for path in proxy.iterdir():
        content = path.read_bytes().lower()
        assert not [word for word in words if word in content], path


def test_what_loading_needs_stays(tmp_path):
    target = telling_target(tmp_path / "secret-llm")
    proxy = save(target, tmp_path / "proxy")
    config = json.loads((proxy / "config.json").read_text())
    assert config["attention_sink"] == 7  # a number says nothing, and a model may read it
    assert json.loads((proxy / "generation_config.json").read_text())["top_k"] == 7
    before, after = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(proxy)
    texts = ["Question: How much is one plus one?\nAnswer: two", "<|bos|>  Ünïcode <|eos|> end"]
    assert after(texts, padding=True) == before(texts, padding=True)
    assert after.special_tokens_map == before.special_tokens_map
    assert (after.padding_side, after.model_max_length) == ("left", before.model_max_length)
    assert AutoModelForCausalLM.from_pretrained(proxy).config.vocab_size == 512


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_familys_configuration_survives(tmp_path, family):
    model, tokenizer = small_model(family), load_tokenizer(resolve("asset:tiny-llama"))
    save_model(model, tokenizer, tmp_path / "plain", card="")
    save_model(model, tokenizer, tmp_path / "proxy", card="", anonymous=True)
    plain, proxy = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("plain", "proxy"))
    assert {**proxy, "_name_or_path": ""} == {**plain, "_name_or_path": ""}


def test_plain_words_are_no_names_of_a_target(tmp_path, monkeypatch):
    assert origin_names("/data/llama", "target", "silu", "qwen2") == {"/data/llama"}
    assert origin_names("acmecorp/Secret-7B") == {"acmecorp/secret7b", "secret7b"}
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("asset:tiny-llama"), tmp_path / "silu")
    assert json.loads((save("silu", tmp_path / "proxy") / "config.json").read_text())["hidden_act"] == "silu"


def test_the_tokenizers_full_disk_is_one_line_and_leaves_no_part(tmp_path, make_model):
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    tokenizer.save_pretrained = full
    with pytest.raises(
        CheckpointError, match=r"proxy cannot be written: No space left on device \(os error 28\); free"
    ):
        save_model(make_model("llama"), tokenizer, tmp_path / "proxy", card="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_no_part_stays_whatever_ends_a_save_and_defects_keep_their_name(tmp_path, make_model, error):
    tokenizer = load_tokenizer(resolve("asset:tiny-llama"))

    def stop(*_, **__):
        raise error("stopped")

    tokenizer.save_pretrained = stop
    with pytest.raises(error, match="stopped"):
        save_model(make_model("llama"), tokenizer, tmp_path / "proxy", card="")
    assert not list(tmp_path.iterdir())

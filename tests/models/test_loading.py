"""What lies in a model's folder is foreign: it runs no code, asks nothing, and what is wrong with it is one line."""

import json
import os
import shutil
import sys
from threading import Event

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fedproxy import model_hub
from fedproxy.data.assets import resolve
from fedproxy.data.loading import load_from_hub
from fedproxy.errors import DataError, FedProxyError, ModelError
from fedproxy.models import Decoder, check_model, load_model, load_tokenizer
from fedproxy.models.loading import build, load_config
from fedproxy.models.modes import evaluating

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


@pytest.fixture
def folder(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, name="config.json", **fields):
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def shards(folder):
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*"))


def truncate(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapter(folder):
    wrapped = get_peft_model(load_model(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(folder)


def lose(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def store(folder, name, dtype):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})


def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


FAULTS = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), r"is a Git LFS pointer.*run git lfs pull in"),
    "pointer to a shard": (lambda f: shards(f)[1].write_text(POINTER), "is a Git LFS pointer"),
    "cut off": (lambda f: truncate(f, -100), r"model\.safetensors is cut off or damaged .*download the model again"),
    "cut in its header": (lambda f: truncate(f, 100), "is cut off or damaged"),
    "empty": (lambda f: truncate(f, 0), "is cut off or damaged"),
    "shard cut off": (lambda f: shards(f)[0].write_bytes(b"1234567890"), r"model-00001.* is cut off or damaged"),
    "shard lost": (lambda f: shards(f)[-1].unlink(), r"lacks model-000\d\d-of-000\d\d.safetensors, 1 of \d+ files"),
    "index without a map": (
        lambda f: [shards(f), change(f, "model.safetensors.index.json", weight_map=[])],
        "must map every weight to a file beside it",
    ),
    "index that leads elsewhere": (
        lambda f: [shards(f), change(f, "model.safetensors.index.json", weight_map={"a": "../../etc/passwd"})],
        "must map every weight to a file beside it",
    ),
    "index with a long name": (
        lambda f: [shards(f), change(f, "model.safetensors.index.json", weight_map={"a": "x" * 5000})],
        r"lacks x+\.\.\., 1 of 1 files with weights; download the rest",
    ),
    "bytes for weights": (
        lambda f: store(f, "model.layers.0.mlp.up_proj.weight", torch.int8),
        r"is quantised \(model\.layers\.0\.mlp\.up_proj\.weight is of type I8\), .*give the checkpoint",
    ),
    "far too many words": (
        lambda f: change(f, vocab_size=10**12),
        r"config\.json asks for \d{14} weights, and the files hold \d+ bytes of them; copy the model again",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights \(no model\.safetensors"),
    "weights as a pipe": (lambda f: pipe(f, "model.safetensors"), "not a regular file"),
    "configuration as a pipe": (lambda f: pipe(f, "config.json"), "not a regular file"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "brackets": (lambda f: (f / "config.json").write_text("[" * 200_000), r"config\.json cannot be read: .* deeply"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json cannot be read: it must hold an object"),
    "no head": (lambda f: lose(f, "lm_head.weight"), "lacks 1 tensors, the first is lm_head.weight"),
    "other width": (
        lambda f: change(f, hidden_size=64),
        r"\.weight has the shape \(.*32.*\), and by config.json .* \(.*64.*\)",
    ),
    "too deep": (lambda f: change(f, num_hidden_layers=10**9), r"num_hidden_layers is 1000000000, .* more than 1000"),
    "too deep inside": (lambda f: change(f, text_config={"n_layer": 20_000}), r"n_layer is 20000, .* correct it"),
    "impossible size": (lambda f: change(f, hidden_size="wide"), "is no model: "),
    "negative heads": (lambda f: change(f, num_attention_heads=0), "model"),
    "a word where generation ends": (
        lambda f: change(f, "generation_config.json", eos_token_id=["end"]),
        r"generation_config\.json: eos_token_id must be a whole number, .*got \['end'\]",
    ),
    "unknown type": (lambda f: change(f, model_type="my_own"), "is no model: .*my_own"),
    "no type": (lambda f: change(f, model_type=None), "is no model"),
    "adapter beside": (adapter, r"holds an adapter beside the model .*merge_and_unload"),
    "adapter alone": (lambda f: [adapter(f), (f / "config.json").unlink()], "holds an adapter without its model"),
    "encoder": (lambda f: change(f, model_type="bert"), r"is no causal LM|cannot|lacks"),
    "encoder and decoder": (lambda f: change(f, model_type="t5", is_encoder_decoder=True), "is an encoder-decoder"),
}
for kind in ("bitsandbytes", "fp8", "mxfp4", "gptq", "awq", "compressed-tensors", "torchao"):
    fields = {"quant_method": kind, "bits": 4, "load_in_4bit": True, "format": "dense"}
    FAULTS[kind] = (
        lambda f, fields=fields: change(f, quantization_config=fields),
        rf"is quantised \({kind}\).*give the checkpoint|is no model",
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_one_line(fault, folder, capfd):
    spoil, match = FAULTS[fault]
    spoil(folder)
    capfd.readouterr()
    with pytest.raises(ModelError, match=match) as found:
        load_model(folder)
    line = str(found.value)
    assert str(folder) in line
    assert "\n" not in line
    assert len(line) < 700
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", ["pointer", "cut off", "shard lost", "fp8", "adapter beside", "unknown type"])
def test_it_is_known_before_weights_are_read(fault, folder):
    FAULTS[fault][0](folder)
    with pytest.raises(ModelError, match=FAULTS[fault][1]):
        check_model(folder)


@pytest.mark.parametrize("prepare", [pickled, shards, lambda f: (f / "README.md").write_text("short")])
def test_forms_of_whole_models(prepare, folder):
    wanted = load_model(folder).state_dict()
    prepare(folder)
    check_model(folder)
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_read_without_running_what_it_asks_for(folder, tmp_path):
    torch.save(load_file(folder / "model.safetensors") | {"a": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"its weights are a pickle that holds more than tensors.*copy the model again"
    ):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("depth", [0, -1])
def test_a_model_without_blocks_is_refused(folder, depth):
    change(folder, num_hidden_layers=depth)
    with torch.device("meta"), pytest.raises(ModelError, match=rf"has {depth} blocks; FedProxy needs one at least"):
        Decoder.of(build(load_config(folder), torch.float32))


@pytest.fixture
def answers(tmp_path):
    """Standard input that says yes to everything, and what is left of it."""
    (tmp_path / "answers").write_text("y\n" * 20)
    kept = os.dup(0)
    handle = os.open(tmp_path / "answers", os.O_RDONLY)
    os.dup2(handle, 0)
    yield lambda: os.lseek(0, 0, os.SEEK_CUR)
    os.dup2(kept, 0)
    os.close(handle)
    os.close(kept)


@pytest.mark.parametrize("read", [load_model, load_config, load_tokenizer, check_model])
def test_code_of_a_folder_is_never_run_and_nobody_is_asked(read, folder, tmp_path, answers, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(0)))
    code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    change(folder, model_type="my_own", architectures=["M"], auto_map=code)
    change(folder, "tokenizer_config.json", tokenizer_class="T", auto_map=code)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="Python code of its own, which is never run") as found:
        read(folder)
    assert str(folder) in str(found.value)
    assert not (tmp_path / "ran").exists()
    assert answers() == 0
    assert capfd.readouterr() == ("", "")


def test_a_known_type_is_loaded_by_transformers_own_class_whatever_code_lies_beside(folder, tmp_path):
    change(folder, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


CHOICES = [
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "kernels-community/flash-attn2@main"},
    {"attn_implementation": {"": "someone/kernel:own"}},
    {"attn_implementation": "flash_attention_2"},  # where it is not installed, from the hub
]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_folder_does_not_choose_attention_code_of_the_hub(folder, choice, monkeypatch):
    def fetch(*_, **__):
        pytest.fail("asked for code of the hub")

    wanted = load_model(folder)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    change(folder, **choice)
    found = load_model(folder)
    ids = torch.arange(8)[None]
    assert torch.equal(found(ids).logits, wanted(ids).logits)
    assert found.config._attn_implementation == wanted.config._attn_implementation
    change(folder, attn_implementation="eager", _attn_implementation="eager")
    assert load_model(folder).config._attn_implementation == "eager"


def test_parts_of_a_configuration_do_not_either(tmp_path):
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"attn_implementation": "someone/own"}}))
    assert load_config(tmp_path).text_config._attn_implementation is None


GENERATION = {"custom_generate": "someone/code", "trust_remote_code": True, "chat_template": "{{ 1 / 0 }}"}


def test_generation_settings_and_chat_templates_run_nothing(folder, tmp_path):
    shutil.copytree(resolve("asset:tiny-llama"), folder, dirs_exist_ok=True)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ 1 / 0 }}")
    change(folder, "generation_config.json", **GENERATION)
    change(folder, "tokenizer_config.json", **GENERATION)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer("a", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[0] == 1
    assert not (tmp_path / "ran").exists()


def test_a_sentencepiece_tokenizer_names_what_reads_it(folder, monkeypatch):
    monkeypatch.setattr("fedproxy.models.loading.find_spec", lambda name: None)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(ModelError, match=r"tokenizer\.model and no tokenizer\.json.*pip install sentencepiece"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"model": {"type": "BPE"}}', "null"])
def test_a_damaged_tokenizer_is_one_line(text, folder):
    (folder / "tokenizer.json").write_text(text)
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ModelError, match=r"has no tokenizer that can be read: .*put the model") as found:
        load_tokenizer(folder)
    assert "\n" not in str(found.value)


def test_a_folder_without_a_tokenizer_is_said_to_have_none(folder):
    with pytest.raises(ModelError, match=r"there is neither a tokenizer\.json nor what could be turned into one; put"):
        load_tokenizer(folder)


def test_damage_that_a_library_trips_over_is_called_damage(folder):
    (folder / "tokenizer.json").write_text("{}")
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ModelError, match=r"what its files say makes no sense \(KeyError: 'added_tokens'\); put the"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_settings_that_are_no_object_name_their_file(name, folder):
    (folder / name).write_text("[1, 2]")
    read = load_model if name.startswith("generation") else load_tokenizer
    with pytest.raises(
        ModelError, match=rf"{name} cannot be read: it must hold an object, got list; copy or download the model"
    ):
        read(folder)


@pytest.mark.parametrize("fields", [{"model_max_length": "many"}, {"model_max_length": [5]}])
def test_a_tokenizer_with_settings_of_a_wrong_type_is_one_line(fields, tmp_path):
    shutil.copytree(resolve("asset:tiny-llama"), tmp_path / "model")
    load_tokenizer(tmp_path / "model")
    change(tmp_path / "model", "tokenizer_config.json", **fields)
    with pytest.raises(ModelError, match=r"has no tokenizer that can be read: .*put the model's own") as found:
        load_tokenizer(tmp_path / "model")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_s_file_that_is_a_pipe_is_not_waited_for(name, folder):
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=rf"{name} cannot be read \(it is not a regular file\)"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/no/such/folder", r"/no/such/folder is no folder; give an asset, a from_pretrained folder or a hub id"),
        ("./nowhere", "is no folder"),
        ("someone/nowhere", "someone/nowhere is no model: .*; give an asset, a from_pretrained folder or a hub id"),
        ("a/b/c/d", "a/b/c/d is no model: "),
        ("no name\x00", "is no model"),
        ("long" * 2000, "is no model"),
    ],
)
def test_paths_that_are_no_model(path, match, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FedProxyError, match=match):
        load_model(path)


def test_a_hub_that_does_not_answer_is_asked_once_and_said(monkeypatch, tmp_path):
    def fail(*_, **__):
        asked.append(1)
        raise OSError("no route to host")

    asked: list[int] = []
    monkeypatch.setattr("socket.socket.connect", fail)
    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waits to ask again"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("fedproxy.model_hub.time.monotonic", lambda: 60.0)
    model_hub._answers.cache_clear()
    said = "it is not in the hub's cache, and the hub cannot be reached; give an asset"
    for read in (load_tokenizer, check_model, load_model):
        with pytest.raises(ModelError, match=said):
            read("someone/nowhere")
    with pytest.raises(DataError, match=r"\(it is not in the hub's cache, and the hub cannot be reached\)"):
        load_from_hub("someone/nowhere", "train")
    assert len(asked) == 1
    model_hub._answers.cache_clear()


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(model_hub, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(model_hub, "_ask", lambda answers: Event().wait(60))
    assert not model_hub._answers(-1)
    model_hub._answers.cache_clear()


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(ModelError, match="is a file; give the folder that it lies in"):
        load_model(folder / "model.safetensors")


def test_a_folder_is_read_without_the_hub(folder, monkeypatch):
    def network(*_, **__):
        pytest.fail("asked the hub")

    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr("socket.getaddrinfo", network)
    load_model(folder)
    with pytest.raises(ModelError):
        load_tokenizer(folder)


def test_a_family_s_own_check_is_said_and_not_its_announcement(folder):
    change(folder, hidden_size=30)  # not a multiple of the number of heads
    with pytest.raises(ModelError) as found:
        load_config(folder)
    assert "Class validation error" not in str(found.value)
    assert "30" in str(found.value)


def test_the_head_of_a_model_in_half_precision_gets_states_without_gaps(folder):
    """PyTorch copies the head once per row for the last positions of a batch otherwise, see ``evaluating``."""
    model, seen = load_model(folder, dtype="bfloat16"), []
    with evaluating(model):
        model.get_output_embeddings().register_forward_pre_hook(lambda _, states: seen.append(states[0]))
        model.generate(torch.tensor([[3, 4, 5], [5, 4, 3]]), max_new_tokens=2, pad_token_id=0)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 1  # the test's own
    assert seen[0].shape[:2] == (2, 1)
    assert all(states.is_contiguous() for states in seen)

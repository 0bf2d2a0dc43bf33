"""The decoder stack is found in every family; subsets are ordinary, renumbered checkpoints."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fedproxy.errors import CheckpointError, ModelError
from fedproxy.models import Decoder, load_model, save_model, state_sha256
from fedproxy.models.decoder import Overlay, copied, parameter_count, set_weights, share_weights

FAMILIES = ["llama", "qwen2", "gemma2", "granite", "cohere", "opt", "gpt2"]
IDS = torch.tensor([[1, 5, 9, 7, 3, 11], [1, 4, 8, 2, 6, 10]])


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_block_gives_the_same_model(make_model, family):
    model = make_model(family, layers=4)
    same = Decoder.of(model).subset(range(4))
    assert torch.equal(same(IDS).logits, model(IDS).logits)
    assert state_sha256(same) == state_sha256(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_subset_equals_the_model_with_blocks_skipped_by_hand(make_model, family, tmp_path):
    model = make_model(family, layers=4)
    decoder = Decoder.of(model)
    shallow = decoder.subset([0, 3])
    assert shallow.config.num_hidden_layers == 2
    with torch.no_grad():
        expected = _skip(decoder, {1, 2})
        assert torch.allclose(shallow(IDS).logits, expected, atol=1e-6)
    shallow.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(IDS).logits, shallow(IDS).logits)
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = loaded.generate(IDS, use_cache=True, **generate)
    assert torch.equal(cached, loaded.generate(IDS, use_cache=False, **generate))
    assert cached.shape == (2, 11)


def _skip(decoder, skipped):
    """Return the logits with some blocks' outputs replaced by their inputs."""
    handles = []
    for index in skipped:

        def identity(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            return before if isinstance(output, torch.Tensor) else (before, *output[1:])

        handles.append(decoder.blocks[index].register_forward_hook(identity, with_kwargs=True))
    logits = decoder.model(IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def test_attention_types_move_with_their_blocks(make_model):
    model = make_model("gemma2", layers=6)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 3
    shallow = Decoder.of(model).subset([0, 2, 5])
    assert shallow.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_tied_embeddings_stay_tied_and_weights_are_copies(make_model):
    model = make_model("gemma2", layers=4)
    shallow = Decoder.of(model).subset([0, 1])
    assert shallow.get_output_embeddings().weight is shallow.get_input_embeddings().weight
    before = state_sha256(model)
    for parameter in shallow.parameters():
        parameter.data.zero_()
    assert state_sha256(model) == before


def test_copies_of_one_tensor_under_two_names_are_one_and_parts_of_it_are_not():
    weight = torch.arange(6.0).reshape(2, 3)
    copies = copied({"embedding": weight, "head": weight.detach(), "row": weight[:1], "square": weight.T})
    assert copies["head"] is copies["embedding"]
    storages = {tensor.untyped_storage().data_ptr() for tensor in (weight, *copies.values())}
    assert len(storages) == 4  # weight itself, embedding and head, row, square
    assert torch.equal(copies["row"], torch.tensor([[0.0, 1.0, 2.0]]))
    assert torch.equal(copies["square"], weight.T)


def test_a_block_kept_twice_is_two_blocks(make_model):
    shallow = Decoder.of(make_model("llama", layers=4)).subset([1, 1])
    first, second = (block.mlp.up_proj.weight for block in shallow.model.layers)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_parameters_count_tied_tensors_once(make_model):
    model = make_model("gemma2", layers=2)
    assert parameter_count(model) == sum(p.numel() for p in model.parameters())
    assert parameter_count(model) < sum(t.numel() for t in model.state_dict().values())


def test_hash_sees_every_weight(make_model):
    model = make_model("llama")
    before = state_sha256(model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] += 1e-4
    assert state_sha256(model) != before


def test_shared_model_costs_nothing_and_replacing_leaves_the_first_alone(make_model):
    model = make_model("llama")
    second = share_weights(model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert second.state_dict()[name].data_ptr() == model.state_dict()[name].data_ptr()
    before = state_sha256(model)
    set_weights(second, {name: torch.zeros_like(model.state_dict()[name])})
    assert state_sha256(model) == before
    assert not second.state_dict()[name].any()


def test_other_kinds_of_model_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ModelError, match="is an encoder-decoder model"):
        Decoder.of(t5)


def test_checkpoints_of_other_kinds_are_refused_in_one_line(tmp_path, make_model):
    T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"t5 is an encoder-decoder model \(t5\)"):
        load_model(tmp_path / "t5")
    with pytest.raises(ModelError, match="nowhere is no folder"):
        load_model(tmp_path / "nowhere")


def test_a_missing_tensor_is_an_error_and_not_a_random_weight(tmp_path, make_model):
    from safetensors.torch import load_file, save_file

    make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, the first is model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path)


def test_meta_models_can_be_planned_with():
    config = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=4, num_attention_heads=2, vocab_size=32)
    with torch.device("meta"):
        decoder = Decoder.of(AutoModelForCausalLM.from_config(config))
    assert len(decoder) == 4
    assert decoder.subset_config([0, 1]).num_hidden_layers == 2


def test_a_full_disk_leaves_the_older_model_and_no_half_one(tmp_path, make_model, monkeypatch):
    from safetensors import SafetensorError

    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "README.md").write_text("older")
    model = make_model("llama")

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"proxy cannot be written: I/O error: No space left"):
        save_model(model, model, tmp_path / "proxy", card="")
    assert [path.name for path in tmp_path.iterdir()] == ["proxy"]
    assert (tmp_path / "proxy" / "README.md").read_text() == "older"


def test_an_overlay_has_the_others_where_there_are_some():
    weights, others = {"a": torch.zeros(1), "b": torch.zeros(1)}, {"b": torch.ones(1), "c": torch.ones(1)}
    both = Overlay(weights, others)
    assert list(both) == ["a", "b", "c"]
    assert len(both) == 3
    assert {name: float(weight) for name, weight in both.items()} == {"a": 0.0, "b": 1.0, "c": 1.0}
    assert "d" not in both

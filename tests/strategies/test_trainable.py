import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fedproxy.errors import ConfigError, ModelError
from fedproxy.strategies.trainable import Trainable

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


def make_llama(layers=4):
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def make_gpt2():
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def lora(**options):
    return Trainable.by_name("lora")(**{"r": 2, "alpha": 6, **options})


def attach(model, seed=0, **options):
    return lora(**options).attach(model, torch.Generator().manual_seed(seed))


def randomise(trainable, seed=1):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in trainable.state().items()}
    trainable.load_state(state)
    return state


def test_starts_as_the_plain_model_with_only_adapters_trainable():
    model = make_llama()
    before = model(IDS).logits
    trainable = attach(model)
    assert torch.equal(model(IDS).logits, before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    # Rank 2 on q 16x16, k and v 16->8, o 16x16, gate and up 16->24, down 24->16, in 4 blocks:
    # 2 * (32 + 24 + 24 + 32 + 40 + 40 + 40) * 4 = 1856.
    assert trainable.num_parameters == 1856


def test_a_is_peft_s_initialisation_from_the_given_generator():
    trainable = attach(make_llama(), seed=3)
    state = trainable.state()
    first = min(name for name in state if "lora_A" in name)
    # Kaiming uniform with a = sqrt(5): uniform in +-1/sqrt(fan_in), fan_in 24 for down_proj, drawn first by name.
    wanted = torch.empty(2, 24).uniform_(
        -1 / math.sqrt(24), 1 / math.sqrt(24), generator=torch.Generator().manual_seed(3)
    )
    assert first.endswith("layers.0.mlp.down_proj.lora_A.weight")
    torch.testing.assert_close(state[first], wanted)
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)


def test_initialisation_is_the_same_for_all_and_leaves_the_global_generator():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = attach(make_llama(), 0).state(), attach(make_llama(), 0).state(), attach(make_llama(), 1).state()
    assert torch.equal(torch.rand(3), wanted)
    assert list(one) == sorted(one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_state_is_a_copy_and_load_state_works_in_place():
    trainable = attach(make_llama())
    live = trainable.parameters()
    addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
    state = randomise(trainable)
    for name, tensor in trainable.parameters().items():
        assert tensor.data_ptr() == addresses[name]
        assert torch.equal(tensor, state[name])
    copy = trainable.state()
    copy[next(iter(copy))].zero_()
    assert torch.equal(trainable.state()[next(iter(copy))], state[next(iter(copy))])


def test_state_names_and_files_are_peft_s(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    model = make_llama()
    model.config._name_or_path = model.name_or_path = "/models/secret-target"
    trainable = attach(model)
    state = randomise(trainable)
    peft = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=list(lora().modules)))
    assert set(state) == set(get_peft_model_state_dict(peft, save_embedding_layers=False))
    trainable.save_adapter(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())
    trainable.save_adapter(tmp_path, base="../proxy")
    assert '"base_model_name_or_path": "../proxy"' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("make", "modules", "count"),
    [(make_llama, ["q_proj", "down_proj"], 8), (make_gpt2, ["c_attn", "c_fc", "c_proj"], 8)],
)
def test_merged_weights_in_a_plain_model_give_the_adapted_logits(make, modules, count):
    model = make()
    trainable = attach(model, modules=modules)
    randomise(trainable)
    merged = trainable.merged_weights()
    plain = make()
    assert len(merged) == count
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    plain.load_state_dict(dict(merged), strict=False)
    assert set(merged) <= set(plain.state_dict())
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_merged_weights_are_computed_when_read_and_outlive_the_adapter(options):
    trainable = attach(make_llama(), modules=["q_proj", "down_proj"], **options)
    randomise(trainable)
    merged = trainable.merged_weights()
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = merged[name], merged[name]
    assert first.data_ptr() != second.data_ptr()  # none is kept
    plain = trainable.detach()
    assert torch.equal(merged[name], first)
    assert not torch.equal(plain.state_dict()[name], first)


def test_merged_weight_by_hand():
    model = make_llama(1)
    trainable = attach(model, modules=["v_proj"], r=1, alpha=3)
    weight = model.model.layers[0].self_attn.v_proj.base_layer.weight.clone()
    a, b = torch.arange(16.0)[None], torch.arange(8.0)[:, None]
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    trainable.load_state({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b})
    merged = trainable.merged_weights()["model.layers.0.self_attn.v_proj.weight"]
    # alpha / r = 3, so entry (i, j) grows by 3 i j.
    torch.testing.assert_close(merged - weight, 3 * torch.outer(torch.arange(8.0), torch.arange(16.0)))


def test_disabled_and_detached_are_the_plain_model():
    model = make_llama()
    before = model(IDS).logits
    names = set(model.state_dict())
    trainable = attach(model)
    randomise(trainable)
    assert not torch.allclose(model(IDS).logits, before)
    with trainable.disabled():
        assert torch.equal(model(IDS).logits, before)
    plain = trainable.detach()
    assert plain is model
    assert set(plain.state_dict()) == names
    assert torch.equal(plain(IDS).logits, before)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"blocks": "ends", "first": 2, "last": 1}, {0, 1, 5}),
        ({"blocks": "ends", "first": 4, "last": 4}, {0, 1, 2, 3, 4, 5}),
        ({"blocks": "last", "last": 2}, {4, 5}),
        ({"blocks": [3, 1]}, {1, 3}),
        ({"blocks": [0]}, {0}),
    ],
)
def test_blocks(options, blocks):
    state = attach(make_llama(6), modules=["q_proj"], **options).state()
    assert {int(name.split("layers.")[1].split(".")[0]) for name in state} == blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"trainable\.r must be from 1 to 65536, got 0"),
        ({"alpha": 0}, r"trainable\.alpha must be from 1e-6 to 1e\+06, got 0"),
        ({"alpha": 1e308}, r"trainable\.alpha must be from 1e-6 to 1e\+06, got 1e\+308"),
        ({"dropout": 1.0}, r"trainable\.dropout must be in \[0, 1\)"),
        ({"modules": []}, r"trainable\.modules must be at least one module name"),
        ({"blocks": "middle"}, r"trainable\.blocks must be all, ends, last, centres or a list .*, got 'middle'"),
        ({"blocks": [1.5]}, r"trainable\.blocks must be all, ends, last"),
        ({"blocks": []}, r"trainable\.blocks must be all, ends, last"),
        ({"last": 0}, r"trainable\.last must be >= 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        lora(**options)


def test_names_that_the_model_lacks():
    with pytest.raises(ConfigError, match=r"no linear layer 'q_prj'; did you mean 'q_proj'"):
        attach(make_llama(), modules=["q_prj"])
    with pytest.raises(ConfigError, match=r"trainable\.modules: 'lm_head' lies outside of the blocks"):
        attach(make_llama(), modules=["lm_head"])
    with pytest.raises(ConfigError, match=r"trainable\.blocks names block 9, but the proxy has blocks 0 to 3"):
        attach(make_llama(), blocks=[9])


def test_states_that_do_not_fit():
    trainable = attach(make_llama())
    state = trainable.state()
    name = next(iter(state))
    with pytest.raises(ModelError, match=f"the trainable state lacks {name}"):
        trainable.load_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(ModelError, match="has extra, which this proxy does not train"):
        trainable.load_state({**state, "extra": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"has shape \(1,\)"):
        trainable.load_state({**state, name: torch.zeros(1)})


def test_bfloat16_proxy_trains_float32_adapters():
    trainable = attach(make_llama().bfloat16())
    assert all(tensor.dtype == torch.float32 for tensor in trainable.state().values())


def test_none_trains_nothing():
    model = make_llama()
    trainable = Trainable.by_name("none")().attach(model, torch.Generator())
    assert trainable.state() == {}
    assert trainable.num_parameters == 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert dict(trainable.merged_weights()) == {}

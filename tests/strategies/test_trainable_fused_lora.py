import copy

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from fedproxy.strategies.trainable import Trainable
from fedproxy.strategies.trainable.fused_lora import FusedLoraLinear

COMMON = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "llama": (LlamaConfig(**COMMON), LINEAR),
    "llama_bias": (LlamaConfig(**COMMON, attention_bias=True), LINEAR),
    "gemma2": (Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8), LINEAR),
    "gpt2": (
        GPT2Config(
            vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        ),
        ["c_attn", "c_fc", "c_proj"],
    ),
}


def make(name, dtype=torch.float32, **options):
    config, modules = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    options = {"r": 2, "alpha": 6, "modules": modules, **options}
    trainable = Trainable.by_name("lora")(**options).attach(model.to(dtype), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    trainable.load_state({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in trainable.state().items()})
    return trainable


def unfused(trainable):
    """The same model with PEFT's own forward."""
    for layer in trainable.layers().values():
        assert type(layer) is FusedLoraLinear
        layer.__class__ = PeftLinear
    return trainable


def ids(seed=0, length=7):
    return torch.randint(1, 31, (3, length), generator=torch.Generator().manual_seed(seed))


def gradients(trainable, batches=1):
    for seed in range(batches):
        tokens = ids(seed, 5 + seed)
        (trainable.model(input_ids=tokens, labels=tokens).loss / batches).backward()
    return {name: parameter.grad for name, parameter in trainable.parameters().items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batches", [1, 3])
def test_outputs_and_gradients_are_peft_s(name, batches):
    fused, plain = make(name), unfused(make(name))
    fused.model.train()
    plain.model.train()
    torch.testing.assert_close(fused.model(ids()).logits, plain.model(ids()).logits, rtol=1e-5, atol=1e-5)
    # In float64 the two differ by rounding alone.
    fused.model.double()
    plain.model.double()
    wanted = gradients(plain, batches)
    for key, gradient in gradients(fused, batches).items():
        assert wanted[key].abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-9, atol=1e-12)


def test_layers_that_read_one_tensor_are_one_group():
    groups = {}
    for name, layer in make("llama").layers().items():
        groups.setdefault(id(layer.group), set()).add(name.rsplit(".", 1)[-1])
    assert sorted(map(sorted, groups.values())) == sorted(
        [["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]] * 2
    )


def test_evaluation_and_generation_agree_with_peft():
    fused, plain = make("llama"), unfused(make("llama"))
    for trainable in (fused, plain):
        trainable.model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fused.model(ids()).logits, plain.model(ids()).logits, rtol=1e-5, atol=1e-5)
    wanted = plain.model.generate(ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(fused.model.generate(ids(), max_new_tokens=5, do_sample=False), wanted)


def test_dropout_falls_back_while_training_only():
    dropped, plain = make("llama", dropout=0.5), unfused(make("llama"))
    dropped.model.eval()
    plain.model.eval()
    torch.testing.assert_close(dropped.model(ids()).logits, plain.model(ids()).logits, rtol=1e-5, atol=1e-5)
    dropped.model.train()
    assert not torch.allclose(dropped.model(ids()).logits, plain.model(ids()).logits, atol=1e-3)
    assert all(gradient is not None for gradient in gradients(dropped).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_bias", "gpt2"])
def test_under_autocast_outputs_and_gradients_are_peft_s_up_to_bfloat16(name, dtype, monkeypatch):
    fused, plain, exact = make(name, dtype), unfused(make(name, dtype)), make(name, dtype)
    exact.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(fused), gradients(plain)
        monkeypatch.setattr(PeftLinear, "forward", None)  # what falls back to PEFT fails
        assert fused.model(ids()).logits.dtype == torch.bfloat16
    wanted = gradients(exact)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())

    def error(found):
        distance = sum((found[key] - wanted[key]).square().sum() for key in wanted)
        return float((distance / sum(gradient.square().sum() for gradient in wanted.values())).sqrt())

    assert error(ours) < 1.5 * error(theirs) < 0.3


def test_half_precision_bases_without_autocast_fall_back():
    # A bfloat16 base has float32 adapters: PEFT casts the input.
    fused, plain = make("llama", torch.bfloat16), unfused(make("llama", torch.bfloat16))
    assert next(iter(fused.parameters().values())).dtype == torch.float32
    assert torch.equal(fused.model(ids()).logits, plain.model(ids()).logits)


def test_gradient_checkpointing():
    fused, plain = make("llama"), unfused(make("llama"))
    fused.model.train()
    fused.model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = gradients(plain)
    for key, gradient in gradients(fused).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-5)


def test_a_copied_model_uses_its_own_weights():
    fused = make("llama")
    wanted = fused.model(ids()).logits.detach()
    twin = copy.deepcopy(fused.model)
    with torch.no_grad():
        for parameter in fused.parameters().values():
            parameter.zero_()
    torch.testing.assert_close(twin(ids()).logits, wanted)
    twin_groups = {id(m.group) for m in twin.modules() if isinstance(m, FusedLoraLinear)}
    assert not twin_groups & {id(layer.group) for layer in fused.layers().values()}


def test_inputs_that_are_copied_on_the_way():
    # Wrappers may hand every layer its own copy of the input: the group notices and computes one by one.
    fused, plain = make("llama"), unfused(make("llama"))
    for layer in fused.layers().values():
        layer.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    wanted = gradients(plain)
    for key, gradient in gradients(fused).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-5)
    assert not all(layer.group.shared for layer in fused.layers().values())
    assert all(layer.group.read is None and not layer.group.waiting for layer in fused.layers().values())


def test_nothing_is_kept_after_a_step():
    fused = make("llama")
    gradients(fused)
    assert all(layer.group.read is None and not layer.group.waiting for layer in fused.layers().values())


def test_gradient_against_finite_differences():
    fused = make("llama")
    fused.model.double()
    torch.autograd.gradcheck(
        lambda a: torch.func.functional_call(
            fused.model.model.layers[0].self_attn.o_proj, {"lora_A.default.weight": a}, (torch.ones(2, 16).double(),)
        ),
        (torch.randn(2, 16, dtype=torch.float64, requires_grad=True),),
    )

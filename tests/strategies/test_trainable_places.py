"""LoRA goes where names say, inside the blocks that fusion moves, and where a low-rank change is exact."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.errors import ConfigError
from fedproxy.models import Decoder
from fedproxy.models.decoder import set_weights, share_weights
from fedproxy.strategies.fusion import Fusion
from fedproxy.strategies.trainable.lora import Lora
from fedproxy.strategies.trainable.reach import expert_weights, read_past

IDS = torch.tensor([[3, 14, 25, 36, 7, 8, 9, 30, 11], [12, 3, 41, 5, 16, 27, 8, 9, 50]])
BASE = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {
    **{"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "topk_method": "greedy"},
}
STATE_SPACE = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4},
    **{"mamba_expand": 2, "mamba_chunk_size": 16, "attn_layer_indices": [1]},
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 61, "pad_token_id": 0}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# family: options, the modules that work without a thought, all that all-linear finds
MIXTURES = {
    "glm4_moe": ({**ROUTED, "head_dim": 8, "first_k_dense_replace": 1}, DENSE),
    "deepseek_v2": ({**ROUTED, **LATENT, "first_k_dense_replace": 1}, ["o_proj", "gate_proj", "up_proj", "down_proj"]),
    "ernie4_5_moe": ({**EXPERTS, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}, DENSE),
    "hunyuan_v1_moe": ({"head_dim": 8, "num_experts": 4, "moe_topk": [2] * 3}, DENSE),
    "afmoe": ({**EXPERTS, "head_dim": 8, "num_experts": 4, "num_dense_layers": 1, "num_shared_experts": 1}, DENSE),
    "qwen3_moe": ({**EXPERTS, "head_dim": 8, "num_experts": 4}, ATTENTION),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "granitemoeshared": ({"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}, ATTENTION),
}


def make(kind, *, plain=False, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = copy.deepcopy(options if plain else {**BASE, **options})
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float().eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data.mul_(3.0)
    return model.requires_grad_(False)


def opt():
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    return make("opt", plain=True, **{**BASE, **sizes})


def gemma3():
    text = {**BASE, "head_dim": 8, "sliding_window": 8}
    return make("gemma3", plain=True, text_config=text, vision_config=VISION, mm_tokens_per_image=1)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def randomised(lora):
    generator = torch.Generator().manual_seed(1)
    lora.load_state({name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in lora.state().items()})
    return lora


def check_exact(model, lora, again, folder):
    """The adapted model, the merged one and PEFT's with the saved adapter say the same; taken off, it is as before."""
    before = logits(again)
    adapted = logits(randomised(lora).model)
    assert (adapted - before).abs().max() > 0.01
    merged = dict(lora.merged_weights())
    lora.save_adapter(folder)
    plain = lora.detach()
    assert torch.equal(logits(plain), before)
    assert set(merged) <= set(plain.state_dict())
    tuned = share_weights(plain)
    set_weights(tuned, merged)
    torch.testing.assert_close(logits(tuned), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(again, folder).eval()), adapted, rtol=1e-4, atol=1e-4)
    return merged


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_train_attention_and_dense_parts_and_leave_their_experts(kind, tmp_path):
    options, modules = MIXTURES[kind]
    model = make(kind, **options)
    lora = Lora(r=2, alpha=4, modules=modules).attach(model)
    assert {name.rpartition(".")[2] for name in lora.layers()} == set(modules)
    assert not lora.experts()
    merged = check_exact(model, lora, make(kind, **options), tmp_path)
    assert not any(weight.ndim == 3 for weight in merged.values())


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_adapted_where_they_are_named(kind, tmp_path):
    options, modules = MIXTURES[kind]
    model = make(kind, **options)
    lora = Lora(r=2, alpha=4, modules=modules, parameters=["gate_up_proj", "down_proj"]).attach(model)
    assert set(lora.experts()) == {f"model.layers.{name}" for name in expert_weights(Decoder.of(make(kind, **options)))}
    merged = check_exact(model, lora, make(kind, **options), tmp_path)
    assert any(weight.ndim == 3 for weight in merged.values())
    # By hand: expert e of the first weight gains s * B_e A_e, its rows of A and columns of B side by side.
    name = min(name for name, weight in merged.items() if weight.ndim == 3)
    pairs = load_file(tmp_path / "adapter_model.safetensors")
    module = f"base_model.model.{name.rpartition('.')[0]}"
    inner = [f"{module}{nested}" for nested in ("", ".base_layer") if f"{module}{nested}.lora_A.weight" in pairs]
    changes = merged[name] - make(kind, **options).state_dict()[name]
    found = []
    for pair in inner:
        a, b = pairs[f"{pair}.lora_A.weight"], pairs[f"{pair}.lora_B.weight"]
        own = torch.stack([sum(torch.outer(b[:, 4 * k + e], a[2 * e + k]) for k in range(2)) for e in range(4)])
        found += [2 * own, 2 * own.mT]
    same = [own for own in found if own.shape == changes.shape]
    assert any(torch.allclose(own, changes, atol=1e-5) for own in same)


def test_fusion_moves_experts_to_their_blocks():
    options, modules = MIXTURES["glm4_moe"]
    target = make("glm4_moe", **options)
    from fedproxy.models import LayerMap, state_sha256

    proxy = Decoder.of(target).subset([0, 2])
    before = {name: weight.clone() for name, weight in proxy.state_dict().items()}
    lora = randomised(Lora(r=2, alpha=4, modules=modules, parameters=["down_proj"]).attach(proxy))
    merged = dict(lora.merged_weights())
    layer_map = LayerMap((0, 2), state_sha256(target))
    fused = Fusion.by_name("plug_in")().fuse(target, before, {**before, **merged}, layer_map).state_dict()
    name = "model.layers.{}.mlp.experts.down_proj"
    assert torch.equal(fused[name.format(2)], merged[name.format(1)])
    assert not torch.equal(fused[name.format(2)], target.state_dict()[name.format(2)])
    assert torch.equal(fused[name.format(1)], target.state_dict()[name.format(1)])


def test_vision_towers_are_left_alone(tmp_path):
    model = gemma3()
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    lora = Lora(r=2, alpha=4).attach(model)
    assert len(lora.layers()) == 7 * 3
    assert all(name.startswith("model.language_model.layers.") for name in lora.layers())
    check_exact(model, lora, gemma3(), tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_all_linear_is_every_layer_of_the_blocks(kind, make_model, tmp_path):
    model = opt() if kind == "opt" else make_model(kind)
    again = opt() if kind == "opt" else make_model(kind)
    decoder = Decoder.of(again)
    wanted = {
        f"{decoder.prefix}.{name}"
        for name, module in decoder.blocks.named_modules()
        if hasattr(module, "weight") and module.weight.ndim == 2
    }
    lora = Lora(r=2, alpha=4, modules="all-linear").attach(model)
    assert set(lora.layers()) == wanted
    check_exact(model, lora, again, tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "router"),
    [
        ("afmoe", MIXTURES["afmoe"][0], "router.gate"),
        ("hunyuan_v1_moe", MIXTURES["hunyuan_v1_moe"][0], "gate.wg"),
        ("jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}, "router.layer"),
    ],
)
def test_all_linear_leaves_routers(kind, options, router):
    model = make(kind, **options)
    assert any(name.endswith(router) and isinstance(module, nn.Linear) for name, module in model.named_modules())
    assert not any(name.endswith(router) for name in Lora(r=2, modules="all-linear").attach(model).layers())


def test_all_linear_takes_no_layer_for_a_router_because_of_a_convolution_of_its_width():
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    model = make(
        "qwen3_5_text", **sizes, head_dim=8, layer_types=["linear_attention", "linear_attention", "full_attention"]
    )
    layers = Lora(r=2, modules="all-linear").attach(model).layers()
    wanted = {name for name, module in plain_layers(model) if not name.endswith("lm_head")}
    assert set(layers) == wanted
    assert any(name.endswith("in_proj_qkv") for name in layers)


def plain_layers(model):
    return [
        (n.removesuffix(".base_layer"), m)
        for n, m in model.named_modules()
        if type(m) is nn.Linear and "lora_" not in n
    ]


PAST = [
    ("mamba", {**SMALL, "state_size": 8}, ["dt_proj", "x_proj", "out_proj"], ["in_proj"]),
    ("falcon_mamba", {**SMALL, "state_size": 8}, ["dt_proj", "x_proj", "out_proj"], ["in_proj"]),
    ("jamba", {**BASE, **JAMBA}, ["dt_proj"], ["in_proj", "x_proj", "q_proj"]),
    ("bamba", {**BASE, **STATE_SPACE}, ["out_proj"], ["in_proj", "o_proj"]),
]


@pytest.mark.parametrize(("kind", "options", "past", "fine"), PAST)
def test_what_a_forward_pass_reads_past_its_layer_is_refused(kind, options, past, fine, tmp_path):
    for name in past:
        with pytest.raises(ConfigError, match=rf"trainable\.modules: .* weight of '{name}' itself .*leave it out"):
            Lora(r=2, modules=[name]).attach(make(kind, plain=True, **options))
    for name in fine:
        Lora(r=2, modules=[name]).attach(make(kind, plain=True, **options))
    model = make(kind, plain=True, **options)
    lora = Lora(r=2, alpha=4, modules="all-linear").attach(model)
    names = {name.rpartition(".")[2] for name in lora.layers()}
    assert names.isdisjoint(past)
    assert names.issuperset(fine)
    check_exact(model, lora, make(kind, plain=True, **options), tmp_path)


def test_it_is_known_from_shapes_alone():
    with torch.device("meta"):
        decoder = Decoder.of(make("falcon_mamba", plain=True, **SMALL, state_size=8))
    with pytest.raises(ConfigError, match="'dt_proj' itself"):
        Lora(modules=["in_proj", "dt_proj"]).check(decoder)
    with pytest.raises(ConfigError, match="no linear layer 'q_proj'"):
        Lora().check(decoder)
    Lora(modules=["in_proj"]).check(decoder)


def test_a_whole_weight_that_is_read_counts_and_a_fact_or_a_slice_of_it_does_not(make_model):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.one.weight.data.zero_()

        def forward(self, x):
            return self.one(x).to(self.one.weight.dtype) + x @ self.two.weight + x[:, :8] @ self.three.weight[:8]

    model = make_model("llama")
    Decoder.of(model).blocks[1].extra = Reads()
    assert {name for name in read_past(Decoder.of(model)) if name.endswith(".weight")} == {"1.extra.two.weight"}


def test_a_layer_that_nothing_could_train_is_refused():
    # A fresh Doge multiplies what dt_proj gives by zero.
    with pytest.raises(ConfigError, match=r"nothing would train 'dt_proj': what it gives has no part.*leave it out"):
        Lora(r=2, modules=["q_proj", "dt_proj"]).attach(make("doge"))
    model = make("doge")
    assert not any("dt_proj" in name for name in Lora(r=2, modules="all-linear").attach(model).layers())


def test_a_layer_that_reads_zeros_alone_is_refused():
    # A fresh Gemma 3n scales the gate's input by zero, so that nothing can move the pairs of the gate and what follows.
    options = {"head_dim": 8, "layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 0, "laurel_rank": 8}
    options |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "altup_num_inputs": 2}
    for name in ("per_layer_input_gate", "per_layer_projection"):
        with pytest.raises(ConfigError, match=rf"nothing would train '{name}': .* or it reads zeros alone; leave it"):
            Lora(r=2, modules=["q_proj", name]).attach(make("gemma3n_text", **options))
    model = make("gemma3n_text", **options)
    lora = Lora(r=2, modules="all-linear").attach(model)
    assert not any("per_layer" in name for name in lora.layers())
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_parts_of_a_list_that_a_block_never_uses_get_no_adapter():
    # Each hybrid block of Zamba 2 holds the adapters of all of them, and calls its own.
    options = {"num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 16}
    options |= {"layers_block_type": ["mamba", "hybrid", "hybrid"], "use_mamba_kernels": False}
    model = make("zamba2", **options)
    lora = Lora(r=2, modules="all-linear").attach(model)
    named = [name.removeprefix("model.layers.") for name in lora.layers() if "adapter_list" in name]
    assert {(name[0], name[-3:]) for name in named} == {("1", "0.0"), ("1", "0.1"), ("2", "1.0"), ("2", "1.1")}
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_experts_that_a_few_tokens_do_not_go_to_get_adapters(make_model):
    class Mixture(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.choice = nn.Linear(width, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

        def forward(self, x):
            return self.experts[1](x) * self.choice(x).softmax(-1)[..., :1]

    model = make_model("llama")
    for block in Decoder.of(model).blocks:
        block.mlp = Mixture(block.mlp.gate_proj.in_features)
    layers = Lora(r=2, modules="all-linear").attach(model).layers()
    assert {name.partition("experts.")[2] for name in layers} == {"", "0", "1", "2"}


def test_a_layer_whose_input_is_zero_until_another_is_trained_is_kept(make_model):
    class Pair(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)
            self.down.weight.data.zero_()

        def forward(self, x):
            return nn.functional.silu(x + self.up(self.down(x)))

    model = make_model("llama")
    for block in Decoder.of(model).blocks:
        block.mlp.act_fn = Pair(block.mlp.gate_proj.out_features)
    lora = Lora(r=2, modules=["down", "up"]).attach(model)
    assert {name.rpartition(".")[2] for name in lora.layers()} == {"down", "up"}
    with pytest.raises(ConfigError, match="nothing would train 'up'"):
        Lora(r=2, modules=["up"]).attach(lora.detach())


def test_a_layer_in_several_places_is_refused(make_model):
    model = make_model("llama")
    blocks = Decoder.of(model).blocks
    blocks[1].mlp.up_proj = blocks[0].mlp.up_proj
    with pytest.raises(ConfigError, match="'up_proj' is one layer in several places"):
        Lora(r=2, modules=["up_proj"]).attach(model)
    Lora(r=2, modules=["q_proj"]).attach(model)


@pytest.mark.parametrize(
    ("make_it", "options", "match"),
    [
        (
            opt,
            {"modules": ["project_in", "project_out"]},
            r"modules: 'project_in' lies outside of the blocks.*known: fc1",
        ),
        (opt, {"modules": ["q_proj", "project_out"]}, r"'project_out' lies outside of the blocks"),
        (opt, {"modules": ["lm_head"]}, r"'lm_head' lies outside of the blocks"),
        (
            opt,
            {"modules": ["model.decoder.layers.0.fc1"]},
            r"must be a layer's name inside its block, one of fc1.*blocks",
        ),
        (opt, {"modules": ["self_attn.q_proj"]}, r"must be a layer's name inside its block"),
        (opt, {"modules": ["self_attn"]}, r"no linear layer 'self_attn'"),
        (opt, {}, r"no linear layer 'o_proj'; did you mean '\w+'\? known: fc1, fc2, k_proj, out_proj, q_proj, v_proj$"),
        (opt, {"modules": ["q_proj", "all-linear"]}, r"'all-linear' stands for all layers; give it alone"),
        (
            opt,
            {"parameters": ["down_proj"], "modules": ["fc1"]},
            r"no routed experts, leave trainable\.parameters empty",
        ),
        (gemma3, {"modules": ["fc1"]}, r"'fc1' lies outside of the blocks"),
        (lambda: make("mixtral", **MIXTURES["mixtral"][0]), {}, r"'gate_proj'; known: .*\(down_proj, gate_up_proj\)"),
        (
            lambda: make("mixtral", **MIXTURES["mixtral"][0]),
            {"modules": ["q_proj"], "parameters": ["down_prj"]},
            r"trainable\.parameters: .*'down_prj'; did you mean 'down_proj'",
        ),
        (
            lambda: make("bamba", **STATE_SPACE),
            {"modules": ["o_proj"], "blocks": [0]},
            r"trainable\.blocks: blocks \[0\]",
        ),
    ],
)
def test_names_that_fit_nothing_in_the_blocks(make_it, options, match):
    with pytest.raises(ConfigError, match=match) as found:
        Lora(r=2, **options).attach(make_it())
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parameters": ["x"], "dropout": 0.1}, r"trainable\.dropout must be 0 where trainable\.parameters is set"),
        ({"modules": [1]}, r"trainable\.modules must be a list of names"),
        ({"modules": [], "parameters": []}, r"trainable\.modules must be at least one module name"),
    ],
)
def test_options_that_do_not_go_together(options, match):
    with pytest.raises(ConfigError, match=match):
        Lora(**options)


def test_experts_alone_and_some_blocks_alone(tmp_path):
    options = MIXTURES["mixtral"][0]
    model = make("mixtral", **options)
    lora = Lora(r=2, alpha=4, modules=[], parameters=["down_proj"], blocks=[1]).attach(model)
    assert list(lora.experts()) == ["model.layers.1.mlp.experts.down_proj"]
    check_exact(model, lora, make("mixtral", **options), tmp_path)


def test_dropout_while_training_does_not_keep_peft_from_loading_a_mixture(tmp_path):
    options, modules = MIXTURES["glm4_moe"]
    model = make("glm4_moe", **options)
    check_exact(
        model, Lora(r=2, alpha=4, modules=modules, dropout=0.1).attach(model), make("glm4_moe", **options), tmp_path
    )

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.errors import ConfigError
from fedproxy.models import Decoder, load_model
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.planning.memory import saved_bytes
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.pipeline.planning.ranks import training_bytes, with_ranks_that_fit

TINY, LOGITS = "recipe=fedproxy_tiny", "fusion.name=logit_offset"


@pytest.mark.parametrize("words", [(), ("trainable.blocks=last",), ("trainable.name=full",)])
def test_saved_bytes_are_those_that_training_keeps(words):
    config = load_config([TINY, "compression.name=none", *words])
    model = load_model(resolve("asset:tiny-llama"))
    config.trainable.attach(model)
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        Decoder.of(model).body(input_ids=torch.zeros(4, 37, dtype=torch.long), use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # attention kernels differ between the meta device and the CPU in what they keep beside their inputs
    assert saved_bytes(Outline.of(config), 4, 37) == pytest.approx(measured, rel=0.1)


def test_flowers_processes_hold_a_few_parts_of_a_file():
    sites = ("engine.name=flower", "data.partition.name=sites", "data.partition.clients=4", "data.rows_per_task=24")
    large = plan(["recipe=fedproxy_llama", *sites])
    # measured over 1 GiB in parts of 128 MiB: 740, 430, 540 and 960 MiB
    found = [
        large.peak(who) >> 20 for who in ("a site's relay", "a site's SuperNode", "the hub's relay", "the SuperLink")
    ]
    assert found == [740, 484, 612, 996]
    assert plan(["recipe=fedproxy_llama", *sites, "engine.part_mb=32"]).peak("a site's relay") >> 20 == 260
    tiny = plan([TINY, *sites])
    assert tiny.peak("a site's relay") == (100 << 20) + 5 * tiny.traffic.proxy  # no more than there is to send
    assert not [need for need in plan([TINY]).memory if "relay" in need.role]


def test_what_lies_in_memory_by_stage():
    with_all, bare = plan([TINY]), plan([TINY, "evaluation.models=[]", "engine.name=workers"])
    target, proxy = 4 * with_all.target_parameters, 4 * with_all.proxy_parameters
    # blocks are scored with the target alone; the proxy is cut from the file it is mapped from, one block at a time
    assert with_all.peak("server", "compression") == target + with_all.activation_bytes
    # four float32 tensors of the largest weight's size, beside what is moved and what stays: together one target
    assert with_all.peak("server", "fusion") == target + 4 * 4 * 64 * 128
    # models are scored one after another: the target is the largest, with one batch's states and logits
    tokens = load_config([TINY]).evaluation.batch_tokens
    batch = 4 * tokens * (4 * 64 + 3 * 128) + min(2**28, 4 * tokens * 512)
    assert with_all.peak("server", "evaluation") == target + batch
    assert {need.role for need in with_all.memory} == {"server", "client"}
    assert {need.role for need in bare.memory} == {"server", "client", "each worker"}
    assert not [need for need in bare.memory if need.stage == "evaluation"]
    # in one process the clients' training is the server's, too
    inside, outside = with_all.peak("server", "federation"), bare.peak("server", "federation")
    assert inside - outside >= with_all.peak("client") - proxy


def test_checkpointing_keeps_the_blocks_inputs_and_one_block():
    words = ["recipe=paper/fedproxy_llama2_7b_heterogeneous", "engine.name=workers"]
    plain, checkpointed = (plan([*words, f"client.gradient_checkpointing={on}"]) for on in ("false", "true"))
    config = load_config(words)
    batch, tokens = config.client.batch_size, config.data.max_input_tokens + config.data.max_target_tokens
    saved, inputs = saved_bytes(Outline.of(config), batch, tokens), 16 * batch * tokens * 4096 * 2
    assert plain.peak("client") - checkpointed.peak("client") == saved - inputs - saved // 16
    assert checkpointed.peak("client") < plain.peak("client")


@pytest.mark.parametrize(("bits", "bytes_each"), [("8bit", 1.0), ("4bit", 0.52)])
def test_quantised_linear_layers_take_fewer_bytes(bits, bytes_each):
    words = ["recipe=paper/fedproxy_llama2_7b_heterogeneous"]
    plain, rounded = plan([*words]), plan([*words, f"client.quantization={bits}"])
    linear = 16 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert plain.peak("client") - rounded.peak("client") == pytest.approx(linear * (2 - bytes_each), rel=1e-6)
    # in one process the rounded proxy lies beside the server's own
    more = rounded.peak("server", "federation") - plain.peak("server", "federation")
    assert more == pytest.approx(2 * plain.proxy_parameters - linear * (2 - bytes_each), rel=1e-6)


LLAMA = "recipe=paper/fedproxy_llama2_7b_heterogeneous"
FOUR = ("trainer.devices=4", "client.batch_size=8")


def training(predicted, role="client"):
    """(bytes of all processes, bytes on one accelerator, accelerators) while a client trains."""
    [need] = [need for need in predicted.memory if (need.role, need.stage) == (role, "training")]
    return need.total, need.device // need.devices, need.devices


def per_batch(rows, target_tokens=128, vocabulary=32_000):
    """What a batch keeps: activations, and the logits of answers as they are and twice in float32."""
    config = load_config([LLAMA])
    tokens = config.data.max_input_tokens + config.data.max_target_tokens
    assert config.data.max_target_tokens == target_tokens
    return saved_bytes(Outline.of(config), rows, tokens) + rows * target_tokens * vocabulary * (2 + 8)


# Llama-2-7B's shape: a block in bfloat16; embedding, head and last norm; LoRA of rank 32 at all seven layers, float32
BLOCK = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
REST = 2 * (2 * 32_000 * 4096 + 4096)
LORA = 4 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


def test_ddp_splits_the_batch_and_keeps_whole_weights_on_every_device():
    one, four = plan([LLAMA, "client.batch_size=8"]), plan([LLAMA, *FOUR])
    copies = 6  # LoRA, gradients, two moments, anchor, conflict map
    assert training(one)[1:] == (16 * BLOCK + REST + copies * 16 * LORA + per_batch(8), 1)
    # one copy more: the buckets in which gradients are averaged
    assert training(four)[1:] == (16 * BLOCK + REST + (copies + 1) * 16 * LORA + per_batch(2), 4)
    # initial state, broadcast, conflict map and tuned state on the host of each process
    assert training(four)[0] == 4 * (training(four)[1] + 4 * 16 * LORA)


def test_fsdp_spreads_weights_gradients_and_moments():
    four = plan([LLAMA, *FOUR, "trainer.strategy=fsdp"])
    part = (16 * BLOCK + REST + 6 * 16 * LORA) // 4
    whole = 2 * (BLOCK + LORA) + REST  # gathered: two blocks, and what is in no block
    assert training(four)[1:] == (part + whole + per_batch(2), 4)
    # every process reads the whole proxy before it lets three quarters go
    assert four.peak("client", "loading") == 4 * (16 * BLOCK + REST)
    assert "accelerators where there are any" in str(four)


def test_an_odd_batch_counts_by_the_device_that_takes_most():
    four, two = plan([LLAMA, *FOUR, "client.batch_size=5"]), plan([LLAMA, *FOUR])  # 5 rows: 2, 1, 1 and 1
    assert training(four)[1] == training(two)[1]


def test_a_physical_batch_bounds_what_private_training_holds_at_once():
    private = ("privacy.unit=example", "privacy.noise_multiplier=1", "privacy.delta=1e-5")
    whole = training(plan([LLAMA, "client.batch_size=8", *private]))[1]
    parts = training(plan([LLAMA, "client.batch_size=8", *private, "privacy.physical_batch=2"]))[1]
    assert whole - parts == per_batch(8) - per_batch(2)
    assert training(plan([LLAMA, "client.batch_size=8", *private, "privacy.physical_batch=32"]))[1] == whole


def test_processes_of_a_client_have_proxies_of_their_own_beside_the_servers():
    bare = plan([LLAMA, *FOUR, "engine.name=workers"])
    inside = plan([LLAMA, *FOUR])
    updates = inside.traffic.drawn * inside.upload_bytes - LORA_LARGEST
    assert inside.peak("server", "federation") - bare.peak("server", "federation") == training(inside)[0] + updates
    # a worker holds what it passes on to its client's processes, and no proxy of its own
    assert training(bare, "each worker")[0] == training(bare)[0] + bare.download_bytes + bare.upload_bytes


LORA_LARGEST = 8 * 4 * 32 * 11008
"""The largest tensor of each of eight updates, which is all that the server holds of updates in files."""


def test_a_plan_does_not_look_for_the_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert plan([TINY, "trainer.devices=4"]).seconds.devices == 4


def test_updates_in_memory_grow_with_the_clients_of_a_round_and_files_do_not():
    many = (TINY, "data.partition.name=iid", "data.partition.clients=512")
    peaks = {
        (engine, drawn): plan([*many, f"federation.clients_per_round={drawn}", f"engine.name={engine}"])
        for engine in ("in_process", "workers")
        for drawn in (16, 256)
    }
    more = {
        engine: peaks[engine, 256].peak("server", "federation") - peaks[engine, 16].peak("server", "federation")
        for engine in ("in_process", "workers")
    }
    assert more["in_process"] == 240 * peaks["workers", 16].upload_bytes
    assert more["workers"] < more["in_process"] / 10


@pytest.mark.parametrize("rule", ["none", "fedsa_lora"])
@pytest.mark.parametrize("engine", ["in_process", "workers"])
def test_what_clients_keep_does_not_grow_the_server(rule, engine):
    few, many = (
        plan([
            TINY, "regularizer.name=none", f"aggregator.name={rule}", f"engine.name={engine}",
            "data.partition.name=iid", f"data.partition.clients={clients}", "federation.clients_per_round=8",
        ])
        for clients in (8, 10_000)
    )  # fmt: skip
    assert few.memory == many.memory
    shared = plan([TINY, "regularizer.name=none", "aggregator.name=fedavg", f"engine.name={engine}",
                   "data.partition.name=iid", "data.partition.clients=8"])  # fmt: skip
    # what is not merged in rounds is merged, or fused, one client at a time: no more than one shared state needs
    assert many.peak("server", "federation") <= shared.peak("server", "federation")


def test_weights_of_another_precision_than_their_files_are_not_mapped():
    plain, half = plan([TINY]), plan([TINY, "target.dtype=bfloat16"])  # the files are in float32
    target, proxy = 2 * half.target_parameters, 2 * half.proxy_parameters
    assert half.peak("server", "compression") == target + proxy + half.activation_bytes
    blocks = target - 2 * (2 * 512 * 64 + 64)  # embedding, head and last norm
    assert half.peak("server", "fusion") == target + blocks // 2 + 4 * 4 * 64 * 128  # three of six blocks are new
    assert half.peak("server", "evaluation") < plain.peak("server", "evaluation")


def test_fusion_that_keeps_more_takes_more():
    plain, joined = plan([TINY]), plan([TINY, LOGITS])
    linear = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)  # what LoRA changes in three blocks
    more = 4 * (2 * plain.proxy_parameters + linear)  # logits are added by three models instead of one
    for stage in ("fusion", "evaluation"):
        assert joined.peak("server", stage) == plain.peak("server", stage) + more


TINY_BLOCK = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64)
TINY_REST = 4 * (2 * 512 * 64 + 64)


def test_rounds_that_are_scored_by_the_fused_model_take_the_target_too():
    plain = plan([TINY, "regularizer.name=none"])
    with_target = plan([TINY, "regularizer.name=none", "federation.validation={every: 1, model: fused}"])
    more = with_target.peak("server", "federation") - plain.peak("server", "federation")
    assert more >= 4 * plain.target_parameters + 3 * (TINY_BLOCK - 4 * 2 * 64)


def test_alignment_takes_one_block_of_the_target_and_what_training_the_emulator_takes():
    words = (TINY, "trainable.blocks=last", "trainable.last=1", "aggregator.name=fedavg", "engine.name=workers")
    plain, aligned = plan([*words]), plan([*words, "realignment={name: emulator, steps: 1, batch_size: 4}"])
    half = plan([*words, "realignment={name: emulator, steps: 1, batch_size: 4}", "target.dtype=bfloat16"])
    more = aligned.peak("server", "federation") - plain.peak("server", "federation")
    emulator = 2 * TINY_BLOCK  # as first sent, of the round before, of this one; gradients and two moments
    config = load_config([*words])
    tokens = config.compression.calibration.max_tokens
    work = saved_bytes(Outline.of(config), 4, tokens) + 6 * 4 * 4 * tokens * 512
    assert more == 6 * emulator + TINY_REST + TINY_BLOCK + work
    assert half.peak("server", "federation") > 2 * half.target_parameters  # converted in memory: all of it


def test_distillation_is_counted_with_its_moments():
    words = (TINY, "distillation.rows=8", "distillation.batch_size=4")
    assert not [need for need in plan([TINY]).memory if need.stage == "distillation"]
    full = plan([*words, "distillation.steps=1"]).peak("server", "distillation")
    lora = plan([*words, "distillation.steps=1", "distillation.train=lora", "distillation.lora_r=4"])
    linear = 3 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128))  # inputs and outputs, three blocks
    outline = Outline.of(load_config([TINY]))
    trained = 3 * TINY_BLOCK + sum(p.nbytes for p in outline.trainable.parameters().values())
    assert full - lora.peak("server", "distillation") == 3 * trained - 16 * 4 * linear


def test_nothing_is_trained():
    predicted = plan(["recipe=zero_shot"])
    assert predicted.trainable_parameters == 0
    assert predicted.seconds.client == 0
    assert "training                    none\n" in str(predicted)


def test_clients_train_the_rank_that_their_memory_has_room_for():
    recipe = ["recipe=fedproxy_tiny", "trainable.r=8", "trainable.alpha=16"]
    needed = {rank: training_bytes(load_config(recipe), rank) / 2**30 for rank in (8, 4, 2, 1)}
    memory = {"tiny_a": needed[8] + 1e-6, "tiny_b": needed[4] + 1e-6, "tiny_c": needed[4] - 1e-6}
    words = ", ".join(f"{client}: {gib:.9f}" for client, gib in memory.items())
    config = with_ranks_that_fit(load_config([*recipe, f"parts.ranks={{memory_gib: {{{words}}}, pad: true}}"]))
    assert config.parts["ranks"].clients == {"tiny_a": 8, "tiny_b": 4, "tiny_c": 2}
    endless = with_ranks_that_fit(load_config([*recipe, "parts.ranks={memory_gib: {tiny_a: 1e300}, pad: true}"]))
    assert endless.parts["ranks"].clients == {"tiny_a": 8}
    with pytest.raises(ConfigError, match=r"parts\.ranks\.memory_gib\.tiny_a: training needs .* even at rank 1"):
        with_ranks_that_fit(load_config([*recipe, "parts.ranks={memory_gib: {tiny_a: 0.01}, pad: true}"]))


def test_answers_that_are_generated_take_their_keys_and_values():
    held, none = "data.holdout=4", "evaluation.evaluators.own_data.max_new_tokens=0"
    said, silent = plan([TINY, held]), plan([TINY, held, none])
    model = load_model(resolve("asset:tiny-llama"))
    keys = Decoder.of(model).blocks[0].self_attn.k_proj.weight.shape[0]
    tokens = 32 * (load_config([TINY]).data.max_input_tokens + 64)  # 32 slots, of the longest prompt and 64 new tokens
    more = said.peak("server", "evaluation") - silent.peak("server", "evaluation")
    assert more == tokens * len(Decoder.of(model)) * 2 * keys * 4
    assert said.peak("server", "fusion") == silent.peak("server", "fusion")

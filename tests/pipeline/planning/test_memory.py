import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.models import Decoder, load_model
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.planning.memory import saved_bytes
from fedproxy.pipeline.planning.outline import Outline

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


def test_what_lies_in_memory_by_stage():
    with_all, bare = plan([TINY]), plan([TINY, "evaluation.models=[]", "engine.name=workers"])
    target, proxy = 4 * with_all.target_parameters, 4 * with_all.proxy_parameters
    assert with_all.peak("server", "compression") == target + proxy + with_all.activation_bytes
    # evaluation: target, proxy, merged weights of the tuned one, the fused model, and one batch
    assert with_all.peak("server", "evaluation") > with_all.peak("server", "fusion") + target
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


def test_fusion_that_keeps_more_takes_more():
    plain, delta, joined = (plan([TINY, word]) for word in ("fusion.mode=replace", "fusion.mode=delta", LOGITS))
    proxy = 4 * plain.proxy_parameters
    # replaced weights are the merged ones; a delta makes new ones; logits are added by three models instead of one
    assert delta.peak("server", "fusion") > plain.peak("server", "fusion")
    assert joined.peak("server", "evaluation") == plain.peak("server", "evaluation") + 2 * proxy


def test_nothing_is_trained():
    predicted = plan(["recipe=zero_shot"])
    assert predicted.trainable_parameters == 0
    assert predicted.seconds.client == 0
    assert "training                    none\n" in str(predicted)

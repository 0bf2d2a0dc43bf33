import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedproxy.config import load_config
from fedproxy.errors import ConfigError, ModelError
from fedproxy.pipeline.plan import plan
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.pipeline.planning.speed import RowLength, training_operations

TINY = "recipe=fedproxy_tiny"


@pytest.mark.parametrize("blocks", ["all", "last"])
def test_operations_are_those_that_pytorch_counts(blocks):
    outline = Outline.of(load_config([TINY, f"trainable.blocks={blocks}"]))
    decoder, tokens = outline.proxy, 8
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, device="meta")
    with FlopCounterMode(display=False) as counter:
        decoder.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    # PyTorch counts whole attention and leaves out the input's gradient of the first trained layer, we count the causal
    # half of it and all of these: a few per cent of so small a model.
    predicted = training_operations(decoder, outline.trainable, RowLength(tokens, 0))
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_seconds_follow_from_the_given_rates():
    words = [TINY, "plan.tflops=2e-6", "plan.client_mbps=8", "plan.server_mbps=16", "plan.merge_gb_per_s=0.001"]
    one, two = plan([*words, "plan.devices=1"]), plan([*words, "plan.devices=3"])
    traffic, row = one.traffic, RowLength(96, 16)
    operations = training_operations(one.outline.proxy, one.outline.trainable, row)
    assert one.seconds.client == pytest.approx(256 * operations / 2e6)  # 256 rows, one epoch, 2e6 operations a second
    assert one.seconds.clients == pytest.approx(4 * one.seconds.client)
    assert two.seconds.clients == pytest.approx(2 * one.seconds.client)  # three, then one
    # 1e6 bytes/s a client, 2e6 the server: four clients' messages together take twice as long there as at one client
    assert one.seconds.transfer == pytest.approx(4 * (traffic.down(2) + traffic.up) / 2e6)
    assert one.seconds.merge == pytest.approx(4 * traffic.up / 1e6)
    assert one.seconds.proxy == pytest.approx(4 * traffic.proxy / 2e6)
    assert one.seconds.round == pytest.approx(one.seconds.clients + one.seconds.transfer + one.seconds.merge)


def test_devices_of_one_client_share_its_batches_and_count_in_turns():
    words = [TINY, "plan.tflops=2e-6", "client.batch_size=8"]
    alone, pairs = plan([*words, "plan.devices=5"]), plan([*words, "trainer.devices=2", "plan.devices=5"])
    assert pairs.seconds.client == pytest.approx(alone.seconds.client / 2)
    assert alone.seconds.clients == pytest.approx(alone.seconds.client)  # four clients on five devices
    assert pairs.seconds.clients == pytest.approx(2 * pairs.seconds.client)  # two pairs, the fifth is idle
    assert "on 5 device(s), 2 to a client (ddp)" in str(pairs)
    three = plan([*words, "trainer.devices=3"])  # of eight rows the busiest device takes three
    assert three.seconds.client == pytest.approx(alone.seconds.client * 3 / 8)
    assert three.seconds.clients == pytest.approx(4 * three.seconds.client)  # by default, the devices of one client
    with pytest.raises(ConfigError, match=r"^plan.devices must be at least the 4 devices .*trainer.devices\), got 3$"):
        plan([*words, "trainer.devices=4", "plan.devices=3"])


def test_one_machine_has_no_transfer_and_rows_may_be_unknown():
    together = plan([TINY, "plan.client_mbps=null"])
    assert together.seconds.transfer == 0
    assert "transfer" not in str(together)
    unknown = plan([TINY, "data.rows_per_task=null"])
    assert unknown.seconds.round is None
    assert "give plan.rows=" in str(unknown)
    assert plan([TINY, "data.rows_per_task=null", "plan.rows=7"]).seconds.client > 0


def test_ten_thousand_clients():
    words = ["data.partition.name=iid", "data.partition.clients=10000", "federation.clients_per_round=64"]
    predicted = plan([TINY, *words, "aggregator.name=flora", "federation.space=product", "regularizer.name=none"])
    traffic = predicted.traffic
    state, moved = traffic.later["state"], traffic.later["base_change"]
    assert moved == traffic.to_all == 64 * state  # 64 clients' factors, stacked
    assert traffic.all_down(2) == 64 * state + 10_000 * moved
    assert "64 of 10,000 in each round" in str(predicted)


def test_a_rate_can_be_measured():
    predicted = plan([TINY, "plan.tflops=measure"])
    assert 0 < predicted.seconds.tflops < math.inf
    assert "(measured here)" in str(predicted)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "billions"), [("7b", 6.738), ("13b", 13.016), ("70b", 68.977)])
def test_large_targets(name, billions):
    # parameter counts of the published Llama-2 checkpoints
    words = [f"target.path=meta-llama/Llama-2-{name}-hf", "target.dtype=bfloat16"]
    predicted = plan(["recipe=paper/fedproxy_llama2_7b_heterogeneous", *words])
    assert predicted.target_parameters == pytest.approx(billions * 1e9, rel=1e-3)
    assert predicted.peak("server") > 2 * predicted.target_parameters


def test_an_unknown_shape_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"\./nowhere is no folder; .*shapes known without a folder: .*Llama-2-70b-hf"):
        plan([TINY, "target.path=./nowhere"])

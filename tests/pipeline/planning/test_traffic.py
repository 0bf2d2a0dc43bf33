"""Predicted bytes against those that tiny runs report, for every rule that changes what is sent."""

import pytest

from fedproxy.config import load_config
from fedproxy.pipeline.planning.outline import Outline
from fedproxy.pipeline.planning.traffic import Traffic

BRIEF = ("data.rows_per_task=8", "client.batch_size=4", "evaluation.models=[]", "federation.rounds=2")
THREE = "federation.clients_per_round=3"
ALIGNED = ("realignment.name=emulator", "realignment.steps=1", "realignment.rows=4", "trainable.blocks=last")
PLAIN, PRODUCT = "regularizer.name=none", "federation.space=product"
QUICK = ("conflict in product space", "rolora", "flora with conflict", "fedsa_lora with conflict", "never merged")
"""Tried in every test run; the others are slow, or test_rules_with_memory compares them on its own runs."""
RANKS = ("trainable.r=8", "parts.ranks.clients={tiny_colors: 2, tiny_sums: 4}")
CASES = {
    "conflict": (),
    "conflict in product space": (PRODUCT,),
    "one client alone": ("data.partition.name=pooled",),
    "three of four": (THREE,),
    "fedavg": ("aggregator.name=fedavg", PLAIN),
    "fedsa_lora": ("aggregator.name=fedsa_lora", PLAIN, THREE),
    "fedsa_lora with conflict": ("aggregator.name=fedsa_lora", THREE),
    "ffa_lora": ("aggregator.name=ffa_lora", PLAIN),
    "rolora": ("aggregator.name=rolora", PLAIN),
    "fedex_lora": ("aggregator.name=fedex_lora", PRODUCT, PLAIN, THREE),
    "fedex_lora of one": ("aggregator.name=fedex_lora", PRODUCT, PLAIN, "data.partition.name=pooled"),
    "flora": ("aggregator.name=flora", PRODUCT, PLAIN, THREE),
    "flora with conflict": ("aggregator.name=flora", PRODUCT),
    "flexlora": ("aggregator.name=flexlora", PRODUCT, PLAIN),
    "scaffold": ("aggregator.name=fedavg", "regularizer.name=scaffold", THREE),
    "feddyn": (
        "aggregator.name=fedavg",
        "aggregator.weighting=uniform",
        "regularizer.name=feddyn",
        "server_optimizer.name=feddyn",
        "server_optimizer.share=1.0",
    ),
    "fisher": ("aggregator.name=fisher", PLAIN),
    "regmean": ("aggregator.name=regmean", PLAIN),
    "whole blocks": ("trainable.name=full",),
    "re-aligned": ALIGNED,
    "int8 with a packed conflict map": ("parts.precision.up=int8", "parts.precision.down=int8"),
    "bf16 up": ("parts.precision.up=bf16", "aggregator.name=fedavg", "regularizer.name=scaffold"),
    "ranks of their own": (*RANKS, "aggregator.name=flexlora", PRODUCT, PLAIN),
    "padded ranks in int8": (*RANKS, "parts.ranks.pad=true", "parts.precision={up: int8, down: int8}"),
    "clipped and noised": ("parts.clip_noise={clip: 0.5, noise: 0.1}",),
    "never merged": ("aggregator.name=none", PLAIN),
    "half precision": ("target.dtype=bfloat16",),
    "narrow blocks": ("compression.name=ffn_width", "compression.ratio=0.3"),
}


def traffic(*options):
    return Traffic.of(Outline.of(load_config(["recipe=fedproxy_tiny", *options])))


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_bytes_are_those_that_a_run_reports(run_tiny, case):
    options = (*BRIEF, *CASES[case])
    report, _ = run_tiny(*options)
    predicted = traffic(*options)
    assert [line.upload_bytes for line in report.rounds] == [predicted.all_up()] * 2
    assert [line.download_bytes for line in report.rounds] == [predicted.all_down(1), predicted.all_down(2)]
    took_part = {client for line in report.rounds for client in line.clients}
    assert report.cost.upload_bytes == 2 * predicted.all_up() + len(took_part) * predicted.collected

"""A run whose server re-aligns the emulator: what is sent, kept, resumed and fused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.data.assets import resolve
from fedproxy.errors import ConfigError
from fedproxy.federation.engines.in_process import _Running
from fedproxy.models import load_model, state_sha256
from fedproxy.pipeline.plan import plan

OPTIONS = (
    "trainable.blocks=last",
    "trainable.last=1",
    "realignment.name=emulator",
    "realignment.steps=3",
    "realignment.rows=32",
    "realignment.lr=0.001",
    "evaluation.models=[]",
)


@pytest.fixture(scope="module")
def aligned(run_tiny):
    """Two rounds, and the broadcasts that clients got."""
    sent = []
    inner = _Running.run

    def spy(self, broadcast, client_ids, **options):
        sent.append(broadcast)
        return inner(self, broadcast, client_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Running, "run", spy)
        report, folder = run_tiny(*OPTIONS)
    return report, folder, sent


def test_every_broadcast_carries_the_emulator_and_nothing_else_of_the_server(aligned):
    report, folder, sent = aligned
    proxy = load_file(folder / "proxy/model.safetensors")
    target = load_model(resolve("asset:tiny-llama")).state_dict()
    kept = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    gone = [t for name, t in target.items() if "layers." in name and int(name.split(".")[2]) not in kept and t.ndim > 1]
    assert gone
    for broadcast, line in zip(sent, report.rounds, strict=True):
        emulator = broadcast.extras["emulator"]
        assert {name.split(".")[2] for name in emulator} == {"0", "1"}
        assert set(emulator) <= set(proxy)
        assert not any(torch.equal(t, secret) for t in emulator.values() for secret in gone if t.shape == secret.shape)
        assert line.download_bytes == broadcast.bytes * 4
        assert broadcast.bytes > sum(t.numel() * 4 for t in emulator.values())
    first, second = (broadcast.extras["emulator"] for broadcast in sent)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first[name], proxy[name])
    assert not torch.equal(second[name], first[name])
    losses = [json.loads(line)["realignment_loss"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert all(loss > 0 for loss in losses)


def test_plan_predicts_the_bytes(aligned):
    report, _, _ = aligned
    predicted = plan(["recipe=fedproxy_tiny", *OPTIONS])
    first, second = report.rounds
    assert first.download_bytes == 4 * (predicted.upload_bytes + predicted.emulator_bytes)
    assert second.download_bytes == 4 * predicted.download_bytes


def test_the_plug_in_touches_adapter_blocks_alone(aligned):
    _, folder, _ = aligned
    target, fused = load_model(resolve("asset:tiny-llama")).state_dict(), load_model(folder / "fused").state_dict()
    changed = {name.split(".")[2] for name in target if not torch.equal(target[name], fused[name])}
    kept = json.loads((folder / "server/layer_map.json").read_text())["proxy_to_target"]
    assert changed == {str(kept[-1])}


def test_going_on_after_round_one_is_bit_identical(run_tiny, aligned):
    _, folder = run_tiny(*OPTIONS, "federation.rounds=1")
    run_tiny(*OPTIONS, "resume=auto", folder=folder)
    for group in ("state", "emulator"):
        mine, whole = (load_file(f / f"checkpoints/round_0002/{group}.safetensors") for f in (folder, aligned[1]))
        assert sorted(mine) == sorted(whole)
        assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_no_round_leaves_the_target(run_tiny):
    _, folder = run_tiny(*OPTIONS, "federation.rounds=0")
    assert state_sha256(load_model(folder / "fused")) == state_sha256(load_model(resolve("asset:tiny-llama")))


def test_the_tuned_proxy_is_scored_with_the_last_emulator(run_tiny):
    from fedproxy.pipeline.tuned import TunedProxy

    proxy = load_model(resolve("asset:tiny-llama"))
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weight = proxy.state_dict()[name]
    tuned = TunedProxy(proxy, {other: weight + 2}, {name: weight + 1}).model().state_dict()
    assert torch.equal(tuned[name], weight + 1)
    assert torch.equal(tuned[other], weight + 2)
    assert torch.equal(proxy.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainable.blocks=all",), r"realignment.name=emulator needs blocks that no client trains, but trainable.blo"),
        (("aggregator.name=none", "data.partition.name=pooled"), r"realignment.name=emulator needs one adapter that"),
        (
            ("fusion.name=logit_offset",),
            r"fusion.name=logit_offset ends with the tuned proxy, but realignment.name=emul",
        ),
        (("fusion.name=none", "fusion.result=proxy"), r"fusion.name=none ends with the tuned proxy, but realignment"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(overrides, message, run_tiny):
    with pytest.raises(ConfigError, match=message):
        run_tiny(*OPTIONS, "regularizer.name=none", *overrides)

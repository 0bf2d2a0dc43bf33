"""Several devices for each client: what is refused, and a run whose clients train in two processes."""

import json

import pytest

from fedproxy.config import load_config
from fedproxy.errors import ConfigError
from fedproxy.pipeline.checks import check_components

TWO = ("recipe=fedproxy_tiny", "trainer.devices=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["client.batch_size=1"], r"client.batch_size must be at least the 2 devices .* \(trainer.devices=2\), got 1"),
        (["trainer.strategy=dp"], r"trainer.strategy must be ddp or fsdp with trainer.devices=2, got 'dp'"),
        (
            ["trainer.strategy=fsdp", "aggregator.name=flora", "federation.space=product"],
            r"aggregator.name=flora moves the frozen weights, which trainer.strategy=fsdp cannot do .*=ddp",
        ),
        (
            ["trainer.strategy=fsdp", "aggregator.name=fisher"],
            r"aggregator.name=fisher needs statistics .*, which trainer.strategy=fsdp cannot",
        ),
        (
            ["client.quantization=4bit", "trainable={name: full, blocks: all}"],
            r"trainable.name=full needs the proxy's own weights, which client.quantization=4bit rounds; set it to none",
        ),
        (
            ["client.quantization=8bit", "trainer.strategy=fsdp"],
            r"trainer.strategy=fsdp needs the proxy's own weights, which client.quantization=8bit rounds",
        ),
        (["client.quantization=2bit"], r"client.quantization"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_components(load_config([*TWO, *overrides]))


def test_a_regularizer_that_is_no_sum_over_coordinates_is_refused_on_spread_weights(monkeypatch):
    config = load_config([*TWO, "trainer.strategy=fsdp"])
    check_components(config)
    monkeypatch.setattr(type(config.regularizer), "coordinatewise", False)
    with pytest.raises(ConfigError, match=r"regularizer.name=conflict is not declared a sum over coordinates"):
        check_components(config)


def test_a_run_on_two_devices_is_that_on_one(tiny_run, run_tiny, capsys):
    report, folder = run_tiny("trainer.devices=2", "federation.rounds=1", "evaluation.models=[]")
    plain = tiny_run[1]
    assert "each client trains on 2 devices (ddp): 8 rows a batch, 4 on each" in capsys.readouterr().err
    first, alone = (json.loads((path / "rounds.jsonl").read_text().splitlines()[0]) for path in (folder, plain))
    assert first["clients"] == alone["clients"]
    # Float32 sums in another order over 4 AdamW steps; a part that counted wrongly would show at 1e-2.
    assert first["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
    assert first["update_norms"] == pytest.approx(alone["update_norms"], rel=1e-3)
    assert report.rounds[0].upload_bytes == alone["upload_bytes"]
    assert not (folder / "exchange").exists() or not any((folder / "exchange").iterdir())


@pytest.mark.slow
def test_workers_whose_clients_have_two_devices_give_the_bits_of_one_process(run_tiny):
    common = ("trainer.devices=2", "federation.rounds=1", "evaluation.models=[]")
    folders = [run_tiny(*common, *engine)[1] for engine in ((), ("engine.name=workers", "engine.workers=2"))]
    alone, side_by_side = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders)
    assert alone == side_by_side


@pytest.mark.slow
def test_spread_weights_can_be_trained_whole(run_tiny):
    common = ("trainable.name=full", "regularizer.name=none", "federation.rounds=1", "evaluation.models=[]")
    spread, _ = run_tiny(*common, "trainer.devices=2", "trainer.strategy=fsdp")
    plain, _ = run_tiny(*common)
    assert spread.rounds[0].train_loss == pytest.approx(plain.rounds[0].train_loss, rel=1e-4)
    assert spread.rounds[0].update_norms == pytest.approx(plain.rounds[0].update_norms, rel=1e-3)
    assert spread.cost.upload_bytes == plain.cost.upload_bytes

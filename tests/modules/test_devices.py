"""Which devices train a client: read from Trainer options, on machines that a test makes up."""

import pytest
import torch

from fedproxy.errors import ConfigError
from fedproxy.modules.devices import ClientDevices, accelerators, one_device, training_device


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ClientDevices(1)),
        ({"devices": "auto"}, ClientDevices(1)),
        ({"devices": "1"}, ClientDevices(1)),
        ({"devices": [3]}, ClientDevices(1, (3,))),
        ({"devices": 2}, ClientDevices(2, (), "ddp")),
        ({"devices": [1, 3], "strategy": "fsdp"}, ClientDevices(2, (1, 3), "fsdp")),
    ],
)
def test_options_are_read(four_gpus, options, expected):
    assert ClientDevices.of(options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, r"trainer.devices must be auto .*, got 0"),
        ({"devices": True}, r"trainer.devices must be auto .*, got True"),
        ({"devices": [0, "x"]}, r"trainer.devices must be auto .*, got \[0, 'x'\]"),
        ({"strategy": "fsdp"}, r"trainer.strategy=fsdp spreads a client over several devices; set trainer.devices=2"),
        ({"devices": 2, "strategy": "deepspeed"}, r"trainer.strategy must be ddp or fsdp with .*, got 'deepspeed'"),
        ({"num_nodes": 2}, r"trainer.num_nodes must be 1, got 2; a client stays on one node"),
        ({"num_nodes": "2"}, r"trainer.num_nodes must be 1, got '2'; a client stays on one node"),
        ({"num_nodes": True}, r"trainer.num_nodes must be 1, got True"),
        ({"devices": 1, "num_nodes": 0}, r"trainer.num_nodes must be 1, got 0"),
        ({"strategy": "ddp_spawn"}, r"trainer.strategy must be auto with one device per client, got 'ddp_spawn'"),
        ({"devices": [0], "strategy": "ddp_notebook"}, r"trainer.strategy must be auto .*, got 'ddp_notebook'"),
        ({"strategy": "deepspeed_stage_3"}, r"trainer.strategy must be auto .*, got 'deepspeed_stage_3'; leave it out"),
        ({"strategy": None}, r"trainer.strategy must be auto .*, got None"),
        ({"devices": 2, "num_nodes": 2}, r"trainer.num_nodes must be 1, got 2; a client stays on one node"),
        ({"devices": 5}, r"trainer.devices=5: this machine has 4 accelerators; use as many at most"),
        ({"devices": [0, 4]}, r"trainer.devices=\[0, 4\]: this machine has 4 accelerators"),
        ({"devices": 2, "strategy": "fsdp", "precision": "16-mixed"}, r"trainer.precision=16-mixed .* use bf16-mixed"),
    ],
)
def test_what_does_not_go_together_is_one_line(four_gpus, options, message):
    with pytest.raises(ConfigError, match=message):
        ClientDevices.of(options)


def test_the_server_uses_one_device_whatever_a_client_has(four_gpus):
    assert one_device({"devices": "auto", "precision": "32-true"}) == {"devices": 1, "precision": "32-true"}
    assert one_device({"devices": [2, 3], "strategy": "ddp"}) == {"devices": [2]}
    assert one_device({"devices": 4, "strategy": "fsdp"}) == {"devices": 1}
    assert one_device({"devices": 1, "strategy": "auto"}) == {"devices": 1, "strategy": "auto"}


def test_where_clients_train(four_gpus):
    assert accelerators({}) == (0, 1, 2, 3)
    assert accelerators({"devices": [1, 3]}) == (1, 3)
    assert accelerators({"accelerator": "cpu"}) == ()
    assert training_device({"devices": [3]}) == torch.device("cuda", 3)
    assert training_device({"accelerator": "cpu"}) == torch.device("cpu")


def test_any_number_of_cpu_processes():
    assert ClientDevices.of({"accelerator": "cpu", "devices": 5}).count == 5


def test_the_split_of_a_batch_in_words():
    words = "each client trains on 2 devices (ddp): 16 rows a batch, 8 on each"
    assert ClientDevices(2, (), "ddp").describe(16) == words
    assert ClientDevices(3, (), "fsdp").describe(16).endswith("16 rows a batch, 5 or 6 on each")

"""Clients that are never merged: each goes on from a state of its own, in a file that is read when it is served."""

import shutil

import pytest
import torch

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.files import ServerFiles
from fedproxy.federation.server.loop import Federation
from fedproxy.federation.server.participation import Participation
from fedproxy.messages import Dropped
from fedproxy.names import file_stem
from fedproxy.protocol import ClientUpdate, TensorFile
from fedproxy.strategies.aggregators import Aggregator
from fedproxy.strategies.server_optimizers import ServerOptimizer


class Adding:
    """Every client's update adds its number, but for those that ``faulty`` names by round."""

    numbers = {"a": 1.0, "b": 2.0, "c": 4.0}

    def __init__(self, faulty=()):
        self.faulty, self.runs, self.served = dict(faulty), [], []

    def run(self, broadcast, client_ids, *, timeout_s=None):
        self.runs.append(list(client_ids))
        for client in client_ids:
            own = broadcast.addressed_to(client)
            self.served.append(own)
            if self.faulty.get(own.round) == client:
                yield Dropped(client, "it raised")
                continue
            delta = {name: torch.full_like(tensor, self.numbers[client]) for name, tensor in own.state.items()}
            loss = float(own.state["layer.weight"].sum())
            yield ClientUpdate(
                client, delta, int(self.numbers[client]), num_tokens=1, train_loss=loss, seconds=1.5, round=own.round
            )


def federation(folder, per_round="all", optimizer="none", min_clients=None, **options):
    return Federation(
        clients=["a", "b", "c"], clients_per_round=per_round, aggregator=Aggregator.by_name("none")(),
        server_optimizer=ServerOptimizer.by_name(optimizer)(**options), job={}, lora_scaling=None, seed=0,
        parts=(), files=ServerFiles(folder), participation=Participation(min_clients),
    )  # fmt: skip


def go(tmp_path, rounds, start=None, engine=None, **options):
    return federation(tmp_path, **options).run(
        start or Progress(0, {"layer.weight": torch.zeros(2)}), rounds, engine or Adding(),
        checkpoints=CheckpointFolder(tmp_path), journal=tmp_path / "rounds.jsonl",
    )  # fmt: skip


def states(folder, progress):
    own = ServerFiles(folder).states.after(progress, list(Adding.numbers))
    return {client: state["layer.weight"].tolist() for client, state in own.items()}


def test_every_client_goes_on_from_its_own_state(tmp_path):
    progress = go(tmp_path, 3)
    # three rounds of its own number each, never another's
    assert states(tmp_path, progress) == {"a": [3.0, 3.0], "b": [6.0, 6.0], "c": [12.0, 12.0]}


def test_the_round_has_one_record(tmp_path):
    record = go(tmp_path, 2).records[1]
    assert record["round"] == 2
    assert record["clients"] == ["a", "b", "c"]
    # in round 2 client k starts at (k, k), so its loss is 2 k: (1*2 + 2*4 + 4*8) / 7
    assert record["train_loss"] == 6.0
    assert record["update_norms"] == pytest.approx([2**0.5, 8**0.5, 32**0.5])
    assert record["upload_bytes"] == record["download_bytes"] == 3 * 2 * 4
    assert record["client_seconds"] == 4.5
    assert record["seconds"] < 1.5  # wall time, not the sum
    assert "cosine" not in record


def test_who_is_not_drawn_keeps_its_state(tmp_path):
    progress = go(tmp_path, 1, per_round=1)
    (drawn,) = progress.records[0]["clients"]
    assert {client for client, state in states(tmp_path, progress).items() if any(state)} == {drawn}


def test_all_clients_of_a_round_run_side_by_side(tmp_path):
    engine = Adding()
    go(tmp_path, 2, engine=engine)
    assert engine.runs == [["a", "b", "c"]] * 2


def test_a_failing_client_is_dropped_and_keeps_its_state(tmp_path):
    progress = go(tmp_path, 3, engine=Adding({2: "b"}), min_clients=2)
    assert states(tmp_path, progress) == {"a": [3.0, 3.0], "b": [4.0, 4.0], "c": [12.0, 12.0]}
    assert [line["clients"] for line in progress.records] == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]]
    assert [line.get("dropped") for line in progress.records] == [None, {"b": "it raised"}, None]
    dropped = progress.records[1]
    assert len(dropped["update_norms"]) == 2
    assert (dropped["upload_bytes"], dropped["download_bytes"]) == (2 * 8, 3 * 8)
    # losses of a at (1, 1) and c at (4, 4): (1*2 + 4*8) / 5
    assert dropped["train_loss"] == 6.8


def test_too_few_clients_end_the_run_in_one_line_and_resume_goes_on(tmp_path):
    with pytest.raises(ClientError, match=r"client 'b' failed in round 2: it raised; that leaves 2 of 3 clients"):
        go(tmp_path, 3, engine=Adding({2: "b"}))
    left = CheckpointFolder(tmp_path).load_latest()
    assert states(tmp_path, go(tmp_path, 3, start=left))["b"] == [6.0, 6.0]


def test_server_optimizers_keep_a_memory_per_client_and_resume_is_exact(tmp_path):
    options = {"optimizer": "sgd", "momentum": 0.5}
    whole = go(tmp_path / "whole", 4, **options)
    go(tmp_path / "parts", 2, **options)
    again = go(tmp_path / "parts", 4, start=CheckpointFolder(tmp_path / "parts").load_latest(), **options)
    for client in Adding.numbers:
        left, right = (
            ServerFiles(tmp_path / name).states.after(progress, [client]).load(client)
            for name, progress in (("whole", whole), ("parts", again))
        )
        assert left.server_memory
        for group in ("state", "server_memory"):
            one, other = getattr(left, group), getattr(right, group)
            assert sorted(one) == sorted(other)
            assert all(torch.equal(one[key], other[key]) for key in one)
    assert [record["round"] for record in again.records] == [1, 2, 3, 4]


@pytest.mark.parametrize("written", [1, 3])
def test_a_kill_between_the_clients_files_and_the_checkpoint_changes_nothing(tmp_path, monkeypatch, written):
    options = {"optimizer": "sgd", "momentum": 0.5}
    whole = go(tmp_path / "whole", 3, **options)
    folder, calls = tmp_path / "killed", []
    go(folder, 2, **options)
    files = ServerFiles(folder)
    save = type(files.states).save

    def killed(self, *arguments):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(arguments)
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(files.states), "save", killed)
        patch.setattr(CheckpointFolder, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go(folder, 3, start=CheckpointFolder(folder).load_latest(), **options)
    latest = CheckpointFolder(folder).load_latest()
    assert latest.round == 2
    assert len(list(folder.glob("states/*/round_0003.safetensors"))) == written
    # what lies there from round 3 is not looked at, rewound or not
    assert states(folder, latest) == states(tmp_path / "whole", CheckpointFolder(tmp_path / "whole").load(2))
    files.rewind(2)
    assert not list(folder.glob("states/*/round_0003.safetensors"))
    assert states(folder, go(folder, 3, start=latest, **options)) == states(tmp_path / "whole", whole)


def test_neither_memory_nor_checkpoints_hold_the_clients_states(tmp_path):
    engine = Adding()
    progress = go(tmp_path, 2, engine=engine)
    assert list(progress.state) == ["layer.weight"]
    assert not progress.state["layer.weight"].any()
    assert all(isinstance(sent.state, TensorFile) for sent in engine.served[3:])  # read tensor by tensor when used
    assert list(CheckpointFolder(tmp_path).load(2).state) == ["layer.weight"]


def test_there_are_states_of_clients_alone(tmp_path):
    own = ServerFiles(tmp_path).states.after(go(tmp_path, 1), ["a", "b", "c"])
    assert "a" in own
    assert "" not in own
    with pytest.raises(KeyError):
        own[""]


def test_a_lost_or_damaged_state_is_one_line_and_no_fresh_start(tmp_path):
    progress = go(tmp_path, 2)
    path = tmp_path / "states" / file_stem("b") / "round_0002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=r"what is kept of client 'b' in .* cannot be used: .*overwrite=true"
    ) as caught:
        go(tmp_path, 3, start=progress)
    assert "\n" not in str(caught.value)
    shutil.rmtree(path.parent)
    with pytest.raises(CheckpointError, match=r"what is kept of client 'b' in .* cannot be used"):
        go(tmp_path, 3, start=progress)


def test_only_three_rounds_of_a_client_stay_on_disk(tmp_path):
    go(tmp_path, 6)
    assert sorted(path.name[:10] for path in (tmp_path / "states" / file_stem("a")).iterdir()) == [
        "round_0004", "round_0005", "round_0006",
    ]  # fmt: skip

"""A checkpoint names what clients and the server must have kept, and goes with it or not at all."""

import shutil

import pytest
import torch

from fedproxy.errors import CheckpointError, ClientError
from fedproxy.federation.client.memory import ClientMemory
from fedproxy.federation.server.asking import rewind
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.files import ClientState, ServerFiles
from fedproxy.messages import Done, Dropped
from fedproxy.names import file_stem

CLIENTS = ["ann", "bob", "cid"]


def remembered(value):
    return {"personal": {"w": torch.tensor([float(value), 1.0])}}


class OneSite:
    """Clients of one site, of which those that are offline do not answer."""

    def __init__(self, folder):
        self.memory, self.asked, self.offline = ClientMemory(folder), [], ()

    def ask(self, messages):
        for client, message in messages.items():
            self.asked.append(client)
            if client in self.offline:
                yield Dropped(client, "offline")
                continue
            self.memory.rewind(client, message)
            yield Done(client)


def rounds(folder, number, *, moving=False):
    """Rounds in which ann takes part every time and bob in the first alone; checkpoints of the last two stay.

    Where frozen weights move, clients receive a round's change with the next one.
    """
    site, files, checkpoints = OneSite(folder), ServerFiles(folder), CheckpointFolder(folder)
    progress = Progress(0, {})
    for round_ in range(1, number + 1):
        change = {"w": torch.full((2,), float(round_))}
        if moving and round_ > 1:
            site.memory.changes.files.keep(round_ - 1, {"w": torch.full((2,), float(round_ - 1))})
        kept = dict(progress.kept)
        for client in ["ann", "bob"] if round_ == 1 else ["ann"]:
            seal = site.memory.save(client, round_, remembered(round_))
            kept[client] = {"round": round_, "seal": seal, "examples": 3, "tokens": 9}
        if moving:
            files.changes.files.write(round_, change)
        progress = Progress(round_, change, files=files.kept(progress, round_, ()), kept=kept)
        checkpoints.save(progress)
    return site, files, checkpoints


def latest(site, files, checkpoints):
    said = []

    def check(progress):
        files.check(progress.files)
        rewind(site, progress, CLIENTS)

    return checkpoints.load_latest(check, said.append), said


def test_the_last_round_of_every_client_is_named_and_the_others_are_not_asked(tmp_path):
    site, files, checkpoints = rounds(tmp_path, 3)
    progress, said = latest(site, files, checkpoints)
    assert {client: progress.kept_by(client).round for client in CLIENTS} == {"ann": 3, "bob": 1, "cid": 0}
    assert (progress.round, said, site.asked) == (3, [], ["ann", "bob"])


@pytest.mark.parametrize("how", ["gone", "flipped", "of another round", "of another client", "of other content"])
def test_memory_that_is_not_what_it_was_rewinds_to_the_checkpoint_before(tmp_path, how):
    site, files, checkpoints = rounds(tmp_path, 3)
    path = tmp_path / f"clients/{file_stem('ann')}/round_0003.safetensors"
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif how == "of another round":
        shutil.copy(tmp_path / f"clients/{file_stem('ann')}/round_0002.safetensors", path)
    elif how == "of another client":
        shutil.copy(tmp_path / f"clients/{file_stem('bob')}/round_0001.safetensors", path)
    else:
        site.memory.save("ann", 3, remembered(7))
    progress, said = latest(site, files, checkpoints)
    assert progress.round == 2
    assert len(said) == 1
    assert "client 'ann'" in said[0]
    assert said[0].endswith("going on after round 2, from the checkpoint before it")
    assert not path.exists()  # the client went back by itself
    assert float(site.memory.load("ann", progress.kept_by("ann"))["personal"]["w"][0]) == 2.0


def test_a_file_that_all_checkpoints_need_ends_in_one_line(tmp_path):
    site, files, checkpoints = rounds(tmp_path, 3)
    shutil.rmtree(tmp_path / "clients" / file_stem("bob"))
    with pytest.raises(CheckpointError, match=r"client 'bob' .*round_0001.*No such file.*, and no checkpoint before"):
        latest(site, files, checkpoints)


def test_a_client_that_does_not_answer_is_named(tmp_path):
    site, files, checkpoints = rounds(tmp_path, 3)
    site.offline = ("bob",)
    with pytest.raises(ClientError, match=r"^client 'bob' does not go back to round 3: offline; .* resume=auto$"):
        latest(site, files, checkpoints)


@pytest.mark.parametrize(
    ("folder", "round_", "back_to"), [("frozen_changes", 2, 2), ("base_changes", 3, 2), ("frozen_changes", 1, None)]
)
@pytest.mark.parametrize("how", ["gone", "flipped", "other content"])
def test_changes_of_frozen_weights_must_be_there_on_both_sides(tmp_path, folder, round_, back_to, how):
    site, files, checkpoints = rounds(tmp_path, 3, moving=True)
    assert latest(site, files, checkpoints)[0].round == 3
    assert site.asked == CLIENTS  # what moves the weights reaches everybody
    path = tmp_path / folder / f"round_{round_:04d}.safetensors"
    if how == "gone":
        path.unlink()
    elif how == "flipped":
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    else:
        (site.memory if folder == "frozen_changes" else files).changes.files.write(round_, {"w": torch.ones(2) / 3})
    if back_to is None:
        with pytest.raises(CheckpointError, match=r"the changes? of the frozen weights in .* no checkpoint before it"):
            latest(site, files, checkpoints)
    else:
        assert latest(site, files, checkpoints)[0].round == back_to


def test_what_a_killed_run_received_is_not_kept(tmp_path):
    site, files, checkpoints = rounds(tmp_path, 2, moving=True)
    site.memory.changes.files.keep(2, {"w": torch.full((2,), 77.0)})  # of a round that is run again
    progress, _ = latest(site, files, checkpoints)
    assert progress.round == 2
    assert site.memory.changes.files.rounds() == [1]


def test_states_of_clients_that_are_never_merged_go_with_the_checkpoint(tmp_path):
    files = ServerFiles(tmp_path)
    files.states.save("ann", 1, ClientState({"w": torch.zeros(2)}))
    kept = files.kept(Progress(0, {}), 1, ["ann"])
    assert list(kept) == ["states/ann"]
    files.check(kept)
    files.states.save("ann", 1, ClientState({"w": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match=r"client 'ann' .* it is not the one that the checkpoint was written with"
    ):
        files.check(kept)
    with pytest.raises(CheckpointError, match=r"the checkpoint names 'memory/ann', which is nothing that is kept"):
        files.check({"memory/ann": {"1": "00"}})


def test_checkpoints_after_the_one_that_was_gone_on_from_disappear_when_it_is_replaced(tmp_path):
    site, files, checkpoints = rounds(tmp_path, 3)
    (tmp_path / "round_0003").rename(tmp_path / "round_0009")
    progress, _ = latest(site, files, checkpoints)
    assert progress.round == 2
    assert checkpoints.rounds() == [2, 9]
    checkpoints.save(Progress(3, progress.state))
    assert checkpoints.rounds() == [2, 3]

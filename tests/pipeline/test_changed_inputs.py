"""What a run is made from may not change behind its back: it is named, and accepted only by its name."""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.federation.server.checkpoint import CheckpointFolder
from fedproxy.models import load_model
from fedproxy.pipeline import inputs
from fedproxy.pipeline.inputs import ChangedInputError
from fedproxy.pipeline.reuse import SharedWork
from fedproxy.pipeline.run import run
from fedproxy.reporting import RunReport

from .test_damaged_files import Lines, flip

PLUGIN = "plugin_of_changed_inputs"


class Place:
    """A target, rows, texts and a plugin of one's own, and a run of two rounds on them."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        self.target = Path(shutil.copytree(resolve("asset:tiny-llama"), folder / "target"))
        self.rows, self.texts, self.plugin = folder / "ward.jsonl", folder / "texts.jsonl", folder / f"{PLUGIN}.py"
        self.rows.write_text(
            "".join(json.dumps({"prompt": f"{i} and 1 is", "target": f"{i}"}) + "\n" for i in range(8))
        )
        self.texts.write_bytes(resolve("asset:tiny-calibration").read_bytes())
        self.plugin.write_text("ONE = 1\n")

    def words(self, folder, *more):
        return [
            *("recipe=fedproxy_tiny", f"target.path={self.target}", "data.tasks=[tiny_sums]", "data.rows_per_task=16"),
            *(f"data.files.ward={self.rows}", f"compression.calibration.path={self.texts}", f"plugins=[{PLUGIN}]"),
            *("client.batch_size=8", "federation.rounds=2", "evaluation.models=[proxy]", "evaluation.limit=2"),
            *(f"output_dir={folder}", *more),
        ]

    def go(self, folder, *more, shared=None):
        display = Lines()
        return run(load_config(self.words(folder, *more)), display, shared), display.lines


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("place"))
    sys.path.insert(0, str(place.folder))
    place.go(place.run)
    yield place
    sys.path.remove(str(place.folder))


@pytest.fixture
def copy(place, tmp_path):
    return Path(shutil.copytree(place.run, tmp_path / "run"))


@contextmanager
def edited(path, old, new):
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_bytes(whole)


MORE = ("resume=auto", "federation.rounds=3", "evaluation.models=[]")


def test_rows_edited_at_the_same_count_are_named_and_nothing_is_touched(place, copy):
    before = (copy / "report.json").read_bytes()
    with edited(place.rows, b"3 and 1 is", b"3 and 2 is"):
        with pytest.raises(
            ChangedInputError, match=r"data changed .*: ward had 8 rows \(SHA-256 \w{12}\) and has 8 rows .*=\[data\]"
        ):
            place.go(copy, *MORE)
        assert (copy / "report.json").read_bytes() == before
        assert CheckpointFolder(copy / "checkpoints").rounds() == [1, 2]
        report, lines = place.go(copy, *MORE, "accept_changed=[data]")
    assert len(report.rounds) == 3
    (note,) = [note for note in report.notes if note.startswith("data changed after round 2")]
    old = RunReport.load(place.run).provenance.data_sha256
    kept = report.provenance.data_sha256
    assert list(kept) == ["until round 2", "from round 3"]
    assert kept["until round 2"] == old != kept["from round 3"]
    assert old in note
    assert kept["from round 3"] in note
    assert any("data changed after round 2" in line for line in lines)


def test_added_rows_are_counted_and_may_be_accepted(place, copy):
    with edited(place.rows, b'{"prompt": "0', b'{"prompt": "new", "target": "row"}\n{"prompt": "0'):
        with pytest.raises(ChangedInputError, match=r"ward had 8 rows .* and has 9 rows"):
            place.go(copy, *MORE)
        report, _ = place.go(copy, *MORE, "accept_changed=[data]")
    assert len(report.rounds) == 3
    assert len(json.loads((copy / "partition.json").read_text())["clients"]["ward"]) == 9


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("target", "target/config.json", b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05'),
        ("tokenizer", "target/tokenizer_config.json", b"{", b'{"x_other": 1, '),
        ("calibration", "texts.jsonl", b'{"text": "', b'{"text": "Other '),
        ("plugins", f"{PLUGIN}.py", b"1", b"2"),
    ],
)
def test_every_other_input_is_named_and_accepted_by_name(place, copy, name, file, old, new):
    with edited(place.folder / file, old, new):
        with pytest.raises(ChangedInputError, match=rf"resume=auto: {name} changed .*accept_changed=\[{name}\]"):
            place.go(copy, *MORE)
        with pytest.raises(ChangedInputError, match=f": {name} changed"):
            place.go(copy, *MORE, "accept_changed=[data,versions]")
        report, _ = place.go(copy, *MORE, f"accept_changed=[{name}]")
        assert any(note.startswith(f"{name} changed after round 2") for note in report.notes)
        again, _ = place.go(copy, "resume=auto", "federation.rounds=4", "evaluation.models=[]")  # accepted once
        assert len(again.rounds) == 4


def test_other_versions_are_named(place, copy, monkeypatch):
    known = inputs.versions()
    monkeypatch.setattr(inputs, "versions", lambda: {**known, "torch": "9.9", "python": "9.9"})
    with pytest.raises(ChangedInputError, match=r"versions changed .*: torch had \S+ and has 9.9; .*\[versions\]"):
        place.go(copy, *MORE)


def test_another_target_of_the_same_shape_is_never_accepted(place, copy):
    whole = (place.target / "model.safetensors").read_bytes()
    model = load_model(place.target)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    try:
        model.save_pretrained(place.target)
        for more in ((), ("accept_changed=[target]",)):
            with pytest.raises(ChangedInputError, match=r"the weights of target.path=.* are others"):
                place.go(copy, *MORE, *more)
    finally:
        (place.target / "model.safetensors").write_bytes(whole)
    place.go(copy, *MORE)  # the same weights at another time of writing


def test_a_name_that_is_no_input_is_refused(place, copy):
    with pytest.raises(ConfigError, match="accept_changed: unknown input 'date'; did you mean 'data'"):
        place.go(copy, *MORE, "accept_changed=[date]")


def test_before_there_is_a_proxy_inputs_may_change(place, tmp_path):
    folder = Path(shutil.copytree(place.run, tmp_path / "run"))
    for name in ("server/layer_map.json", "rounds.jsonl", "partition.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    with edited(place.rows, b"3 and 1 is", b"3 and 2 is"):
        report, _ = place.go(folder, "resume=auto", "evaluation.models=[]")
    assert report.run.status == "completed"


def test_rounds_on_mixed_rows_are_not_left_to_other_runs(place, copy, tmp_path):
    shared = SharedWork(tmp_path / "shared")
    with edited(place.rows, b"3 and 1 is", b"3 and 2 is"):
        place.go(copy, *MORE, "accept_changed=[data]", shared=shared)
    assert not (shared.folder / "federations").exists()


def test_scores_of_other_questions_are_not_reused(place, copy, monkeypatch):
    from fedproxy.pipeline import evaluation

    _, lines = place.go(copy, "resume=auto", "federation.rounds=3")
    assert not any("scored again" in line or line.startswith("evaluated proxy") for line in lines)
    monkeypatch.setattr(evaluation, "questions_sha256", lambda tasks, shots: "other")
    _, lines = place.go(copy, "resume=auto", "federation.rounds=4")
    assert "proxy is scored again: the questions changed" in lines


def test_an_edited_proxy_and_a_permuted_layer_map_end_in_one_line(place, copy):
    path = copy / "server/layer_map.json"
    fields = json.loads(path.read_text())
    fields["proxy_to_target"].reverse()
    whole = path.read_text()
    path.write_text(json.dumps(fields) + "\n")
    with pytest.raises(CheckpointError, match=r"layer_map.json is not as the run wrote it"):
        place.go(copy, *MORE)
    path.write_text(whole)
    flip(copy / "proxy/model.safetensors", -9)
    with pytest.raises(CheckpointError, match=r"proxy/model.safetensors is not as the run wrote it"):
        place.go(copy, *MORE)


@pytest.fixture(scope="module")
def undamaged(place, tmp_path_factory):
    """The final state of a run that went on without damage."""
    folder = Path(shutil.copytree(place.run, tmp_path_factory.mktemp("whole") / "run"))
    place.go(folder, *MORE)
    return third_state(folder)


def third_state(folder):
    key = json.loads((folder / "checkpoints/round_0003/progress.json").read_text())["run"]
    return CheckpointFolder(folder / "checkpoints", run=key).load(3).state


def facts(folder):
    return json.loads((folder / "server/facts.json").read_text())


@pytest.mark.parametrize("file", ["state.safetensors", "conflict.safetensors", "progress.json"])
def test_a_damaged_checkpoint_falls_back_and_ends_in_the_same_bits(place, copy, undamaged, file):
    flip(copy / "checkpoints/round_0002" / file, -9)
    report, lines = place.go(copy, *MORE)
    (line,) = [line for line in lines if "is damaged" in line]
    assert "round_0002" in line
    assert line.endswith("going on after round 1, from the checkpoint before it")
    assert line in report.notes
    state = third_state(copy)
    assert all(torch.equal(state[name], undamaged[name]) for name in undamaged)
    assert [json.loads(line)["round"] for line in (copy / "rounds.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_checkpoint_of_another_round_or_run_is_not_gone_on_from(place, copy, tmp_path):
    other = tmp_path / "other"
    place.go(other, "client.lr=0.02", "evaluation.models=[]")
    for number in (1, 2):
        shutil.rmtree(copy / f"checkpoints/round_000{number}")
        shutil.copytree(other / f"checkpoints/round_000{number}", copy / f"checkpoints/round_000{number}")
    with pytest.raises(CheckpointError, match=r"round_0002 is damaged \(it is of another run\), and no checkpoint"):
        place.go(copy, *MORE)
    (other / "checkpoints/round_0002").rename(other / "checkpoints/round_0007")
    _, lines = place.go(other, *MORE, "client.lr=0.02")
    assert any("round_0007 is damaged (it is of round 2); going on after round 1" in line for line in lines)
    assert CheckpointFolder(other / "checkpoints").rounds() == [2, 3]


def test_a_run_of_a_version_without_hashes_is_one_line(place, copy):
    path = copy / "server/facts.json"
    path.write_text(json.dumps({k: v for k, v in facts(copy).items() if k != "content_sha256"}))
    with pytest.raises(CheckpointError, match=r"facts.json has no hash .*: another version .*; finish the run"):
        place.go(copy, *MORE)

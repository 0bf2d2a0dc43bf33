"""Every key of a recipe belongs to a stage, what is done is not done again, and the way to training is short."""

import dataclasses
import traceback
import weakref
from functools import partial
from pathlib import Path

import pytest

import fedproxy
from fedproxy import fit
from fedproxy.config import RunConfig, load_config
from fedproxy.data.assets import resolve
from fedproxy.errors import CheckpointError, ClientError
from fedproxy.modules.causal_lm import CausalLMModule
from fedproxy.pipeline import context, evaluation
from fedproxy.pipeline.context import Facts, Run
from fedproxy.pipeline.reads import MAY_CHANGE, STAGES, UNREAD, lies_below
from fedproxy.pipeline.run import run
from fedproxy.pipeline.stages import federate
from fedproxy.pipeline.stages.compress import Compress
from fedproxy.pipeline.stages.evaluate import Evaluate
from fedproxy.pipeline.stages.federate import Federate
from fedproxy.pipeline.stages.fuse import Fuse
from fedproxy.pipeline.stages.report import Report
from fedproxy.registry import Component

from .conftest import SMALL

ONE_BY_ONE = ("target", "data", "client", "federation", "evaluation")
"""Sections whose keys are assigned one by one; options of components come and go together."""
INSIDE = {"trainer.devices", "trainer.strategy", "trainer.precision"}
"""Assigned keys of a mapping that Lightning defines."""


def keys_of(config):
    """Yield the keys that must be assigned."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in ONE_BY_ONE:
            assert dataclasses.is_dataclass(value)
            assert not isinstance(value, Component)
            yield from (f"{item.name}.{part.name}" for part in dataclasses.fields(value))
        else:
            yield item.name


def assigned():
    return {key for stage in STAGES for key in stage.settings} | set(UNREAD)


def test_every_key_of_a_recipe_is_assigned_to_a_stage_and_none_is_made_up():
    known = set(keys_of(load_config(["recipe=fedproxy_tiny"])))
    assert known - assigned() == set()
    assert assigned() - known == INSIDE


def test_a_new_key_is_missed():
    @dataclasses.dataclass(frozen=True)
    class Longer(RunConfig):
        patience: int = 3

    @dataclasses.dataclass(frozen=True)
    class LongerClient(type(load_config(["recipe=fedproxy_tiny"]).client)):
        patience: int = 3

    plain = load_config(["recipe=fedproxy_tiny"])
    longer = Longer(target=plain.target, data=plain.data, client=LongerClient())
    assert set(keys_of(longer)) - assigned() == {"patience", "client.patience"}


def test_what_may_change_when_a_run_goes_on_is_assigned_too():
    assert {key for key in MAY_CHANGE if not lies_below(key, assigned())} == set()


@pytest.fixture
def done(monkeypatch):
    """The stages that were done, in order."""
    names = []
    for stage in (Compress, Federate, Fuse, Evaluate, Report):

        def do(self, current, work=stage.do):
            names.append(self.name)
            work(self, current)

        monkeypatch.setattr(stage, "do", do)
    return names


def go(folder, *words):
    return run(load_config([*SMALL, "federation.rounds=1", "evaluation.models=[]", f"output_dir={folder}", *words]))


def test_only_what_is_left_is_done(tmp_path, done):
    folder = tmp_path / "run"
    go(folder)
    assert done == ["compress", "federate", "fuse", "evaluate", "report"]
    done.clear()
    go(folder, "resume=auto")  # finished
    assert done == []
    go(folder, "resume=auto", "federation.rounds=2")
    assert done == ["federate", "fuse", "evaluate", "report"]
    done.clear()
    go(folder, "resume=auto", "federation.rounds=2", "evaluation.models=[proxy]", "evaluation.limit=2")
    assert done == ["evaluate", "report"]
    done.clear()
    (folder / "fused/config.json").write_text("{}")
    go(folder, "resume=auto", "federation.rounds=2")
    assert done == ["fuse", "evaluate", "report"]
    done.clear()
    (folder / "report.json").unlink()
    go(folder, "resume=auto", "federation.rounds=2")
    assert done == ["evaluate", "report"]


def test_a_report_that_failed_later_does_not_count_as_finished(tmp_path, done, monkeypatch):
    folder = tmp_path / "run"
    go(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluate, "do", lambda self, current: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(folder, "resume=auto", "evaluation.limit=2")
    assert go(folder, "resume=auto").run.status == "completed"


def test_the_target_is_hashed_once_however_often_it_is_fused(tmp_path, monkeypatch):
    hashed = []
    sha256 = context.state_sha256
    monkeypatch.setattr(context, "state_sha256", lambda model: hashed.append(model) or sha256(model))
    words = ("federation.rounds=2", "federation.validation={every: 1, rows: 2, model: fused}")
    report = go(tmp_path / "run", *words)
    assert len([line for line in report.rounds if line.validation]) == 2
    assert len(hashed) == 1


def test_one_large_model_is_there_at_a_time(tmp_path, monkeypatch):
    """The target, tuned and fused models go before the next one comes: nothing holds on to them."""
    loaded, left = [], []
    let_go = Run.let_go

    def noted(load, path, **options):
        model = load(path, **options)
        loaded.append((Path(path).name, weakref.ref(model)))
        return model

    def watched(self):
        let_go(self)
        left.append([name for name, model in loaded if name != "proxy" and model() is not None])

    for module in (context, evaluation):
        monkeypatch.setattr(module, "load_model", partial(noted, module.load_model))
    monkeypatch.setattr(Run, "let_go", watched)
    go(tmp_path / "run", "evaluation.models=[target, proxy, proxy_tuned, fused]")
    assert {name for name, _ in loaded} == {"proxy", "fused", resolve("asset:tiny-llama").name}
    assert len(left) == 5 + 4  # stages, and models that were scored
    assert left == [[]] * len(left)


def test_facts_of_another_version_are_one_line(tmp_path):
    Facts(started="now", target_parameters=3).save(tmp_path / "facts.json")
    assert Facts.load(tmp_path / "facts.json") == Facts(started="now", target_parameters=3)
    assert Facts.load(tmp_path / "none.json") is None
    context.write_sealed(tmp_path / "facts.json", {"started": "now", "finished": True})
    with pytest.raises(CheckpointError, match="is of another version of FedProxy; finish the run with it, or"):
        Facts.load(tmp_path / "facts.json")


def test_from_fit_to_training_step_there_are_at_most_eight_frames_of_ours(tmp_path, monkeypatch):
    package, seen = str(Path(fedproxy.__file__).parent), []

    class SeenError(BaseException):
        pass

    def step(self, batch, batch_idx):
        frames = traceback.extract_stack()
        start = next(i for i, frame in enumerate(frames) if frame.filename == fit.__file__)
        seen.extend(f"{f.filename}:{f.name}" for f in frames[start:] if f.filename.startswith(package))
        raise SeenError

    monkeypatch.setattr(CausalLMModule, "training_step", step)
    with pytest.raises(SeenError):
        fit.main([*SMALL, f"output_dir={tmp_path / 'run'}"])
    assert seen[0].endswith("fit.py:main")
    assert seen[-1].endswith("training.py:tune")
    assert len(seen) <= 8, seen


def test_clients_are_let_go_where_a_run_cannot_go_on(tmp_path, monkeypatch):
    words = [*SMALL, f"output_dir={tmp_path / 'run'}", "evaluation.models=[]"]
    fit.main([*words, "federation.rounds=1"])
    closed = []

    def refuse(sites, progress, clients):
        close = sites.close
        monkeypatch.setattr(sites, "close", lambda: (closed.append(sites), close()))
        raise ClientError("client 'a' does not go back")

    monkeypatch.setattr(federate, "rewind", refuse)
    with pytest.raises(ClientError, match="does not go back"):
        fit.main([*words, "federation.rounds=2", "resume=auto"])
    assert len(closed) == 1

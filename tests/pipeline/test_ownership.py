"""What overwrite=true deletes: what a run made and nothing else, last of all, and only where a marker proves it."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from fedproxy import recipes
from fedproxy.comparison.arguments import read_study
from fedproxy.comparison.execution import _delete_run
from fedproxy.config import load_config, to_yaml
from fedproxy.errors import ConfigError, DataError, FedProxyError
from fedproxy.federation.engines import RemoteClient
from fedproxy.federation.engines.workers import WorkerPool
from fedproxy.locks import LOCK_FILE, locked
from fedproxy.pipeline.folder import RunFolder, check_inputs_outside
from fedproxy.pipeline.ownership import MARKER, first_foreign
from fedproxy.pipeline.reuse import SharedWork
from fedproxy.pipeline.run import run

from .conftest import SMALL

QUICK = ("federation.rounds=1", "evaluation.models=[]")


def content(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


def config(folder, *words):
    return load_config([*SMALL, *QUICK, f"output_dir={folder}", *words])


@pytest.fixture(scope="module")
def made(run_tiny):
    """A run that left nearly all that runs leave."""
    words = ("loggers=[csv]", "trainer.logger=csv", "trainer.log_every_n_steps=1", "evaluation.models=[fused]")
    _, folder = run_tiny(*QUICK, "distillation.steps=1", "distillation.rows=16", "client.batch_size=16", *words)
    return folder


@pytest.fixture
def old(made, tmp_path):
    shutil.copytree(made, tmp_path / "old")
    return tmp_path / "old"


def claim(folder, *words):
    """Do what a run does to its folder before any work."""
    own = RunFolder(folder)
    with own.held():
        own.check(config(folder, *words))
        own.claim(config(folder, *words))


def test_all_that_a_run_leaves_is_its_own_and_goes(made, old):
    assert first_foreign(made) is None
    names = {path.name for path in old.iterdir()}
    assert {"logs", "adapter", "fused", "proxy", "rows", "server", "evaluation", "checkpoints", MARKER} <= names
    assert LOCK_FILE not in names
    claim(old, "overwrite=true")
    assert sorted(content(old)) == [MARKER, "checkpoints", "config.yaml", "rows", "server"]


@pytest.mark.parametrize(
    "words",
    [
        ("privacy.unit=example", "privacy.secure_aggregation=true"),
        ("privacy.unit=client", "privacy.noise_at=server"),
    ],
)
def test_ledgers_keys_and_noise_of_a_private_run_are_its_own_and_go(run_tiny, tmp_path, words):
    budget = ("privacy.noise_multiplier=1", "privacy.delta=1e-5", "privacy.accountant=rdp")
    rule = ("aggregator.name=fedavg", "regularizer.name=none", "evaluation.tasks=[]", "federation.rounds=1")
    _, folder = run_tiny(*rule, *budget, *words, folder=tmp_path / "out")
    assert (folder / "rows/.privacy_ledger").is_dir()
    assert first_foreign(folder) is None
    claim(folder, "overwrite=true")
    assert not (folder / "rows/.privacy_ledger").exists()


@pytest.mark.parametrize(
    "left",
    [
        *("rows/.privacy_ledger/releases/a-1/round_0003.part4242", "rows/.privacy_ledger/.a-1.json.0a1b2c3d"),
        *("checkpoints/clients/a-1/round_0001.part77", "rows/.signing_keys/.a-1.sums.json.0a1b2c3d"),
    ],
)
def test_what_a_killed_run_was_just_writing_is_its_own(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_bytes(b"half")
    assert first_foreign(tmp_path) is None


@pytest.mark.parametrize(
    "foreign",
    [
        *("notes.md", "cache/model.safetensors", "fused/notes.txt", "fused/gguf/model.gguf", "server/key.pem"),
        *("checkpoints/best/state.safetensors", "evaluation/plot.png", "rows/raw.csv", "logs/notes.txt", "empty/"),
        *("proxy/train.py", "exchange/mine", ".git/config", "adapter/merged.bin", "csqa_5shot/scores.json"),
    ],
)
def test_anything_foreign_is_named_and_nothing_is_deleted(old, foreign):
    path = old / foreign
    if foreign.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = content(old)
    with pytest.raises(ConfigError) as caught:
        run(config(old, "overwrite=true"))
    assert str(caught.value) == (
        f"output_dir {old} is not deleted: no run made {path}; move that away, or choose another output_dir"
    )
    assert content(old) == before


def test_links_are_never_followed(old, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "round_0001.safetensors").write_text("mine")
    (old / "checkpoints" / "frozen_changes").symlink_to(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"no run made .*frozen_changes"):
        claim(old, "overwrite=true")
    (old / "checkpoints" / "frozen_changes").unlink()
    (tmp_path / "link").symlink_to(old)
    with pytest.raises(ConfigError, match=r"link is a link to .*old, and nothing is deleted through a link; name"):
        claim(tmp_path / "link", "overwrite=true")
    assert (tmp_path / "data" / "round_0001.safetensors").read_text() == "mine"


def test_a_folder_without_a_marker_is_never_deleted(old):
    (old / MARKER).unlink()  # a run of an older version, or a project with a config.yaml and a server/
    before = content(old)
    with pytest.raises(
        ConfigError, match=rf"has no {MARKER}, so nothing proves that a run made it .*delete it by hand"
    ):
        run(config(old, "overwrite=true"))
    assert content(old) == before
    claim(old, "resume=auto", "distillation.steps=1", "distillation.rows=16", "client.batch_size=16",
          "trainer.logger=csv", "trainer.log_every_n_steps=1")  # fmt: skip


def test_people_work_elsewhere(old, monkeypatch):
    (old / "inside").mkdir()
    for place, word in ((old, "the working directory"), (old / "inside", "the working directory")):
        with monkeypatch.context() as patch:
            patch.chdir(place)
            for name in (old, os.path.relpath(old)):
                with pytest.raises(ConfigError, match=f"is or holds {word} and is never deleted"):
                    claim(name, "overwrite=true")
    monkeypatch.setenv("HOME", str(old / "inside"))
    with pytest.raises(ConfigError, match="is or holds your home folder and is never deleted"):
        claim(old, "overwrite=true")


def test_the_users_home_is_meant_by_its_sign(old, monkeypatch):
    monkeypatch.setenv("HOME", str(old.parent))
    assert RunFolder(f"~/{old.name}").root == old
    with pytest.raises(ConfigError, match=r"overwrite=true would delete data.files.ward=.*, which lies in output_dir"):
        check_inputs_outside({"data": {"files": {"ward": f"~/{old.name}/config.yaml"}}}, old)
    assert RunFolder("~nobody_of_this_name/run").root == Path("~nobody_of_this_name/run")


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("data.files.ward=gone.jsonl", DataError),
        ("target.path=broken", (FedProxyError, SafetensorError)),
        ("compression.calibration.path=gone.jsonl", FedProxyError),
        ("aggregator.name=fedex_lora", ConfigError),
        ("evaluation.limit=100000", FedProxyError),
        ("federation.validation={every: 1, rows: 100000}", FedProxyError),
    ],
)
def test_a_slip_spares_the_old_run(old, tmp_path, monkeypatch, word, error):
    from fedproxy.data.assets import resolve

    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("asset:tiny-llama"), "broken")
    weights = Path("broken/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    before = content(old)
    with pytest.raises(error):
        run(config(old, "overwrite=true", "data.tasks=[tiny_sums]", "evaluation.models=[fused]", word))
    assert content(old) == before


def test_a_run_that_is_alive_is_neither_deleted_nor_joined(old):
    before = content(old)
    with locked(old):
        for way in ("overwrite=true", "resume=auto", "resume=never"):
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*; wait for it"):
                run(config(old, way))
    assert content(old) == before


@pytest.mark.parametrize(
    ("key", "value", "none", "effect"),
    [
        ("overwrite", "true", "false", "deletes a run"),
        ("accept_changed", "[data]", "[]", "lets one start go on with changed inputs"),
    ],
)
def test_a_file_never_says_what_is_said_for_one_start(tmp_path, key, value, none, effect):
    (tmp_path / "base.yaml").write_text(f"extends: fedproxy_tiny\n{key}: {value}\n")
    (tmp_path / "mine.yaml").write_text(f"extends: {tmp_path}/base.yaml\n")
    for name in ("base", "mine"):
        message = rf"^recipe file .*base.yaml: {key} {effect}, so it comes from the command line alone; remove the key$"
        with pytest.raises(ConfigError, match=message):
            load_config([f"recipe={tmp_path}/{name}.yaml"])
        with pytest.raises(ConfigError, match=message):
            load_config([f"recipe={tmp_path}/{name}.yaml", f"{key}={none}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config(tmp_path / "out", f"{key}={value}")))
    assert not getattr(load_config([f"recipe={tmp_path}/config.yaml"]), key)


@pytest.mark.parametrize("left", [[], [MARKER], [".config.yaml.abcd1234"], [MARKER, "server", "rows", "checkpoints"]])
def test_what_a_run_leaves_that_was_killed_at_its_start_is_in_nobodys_way(tmp_path, left):
    for name in left:
        if "." in name:
            (tmp_path / name).write_text(json.dumps({"version": 1}))
        else:
            (tmp_path / name).mkdir()
    claim(tmp_path)
    assert sorted(content(tmp_path)) == [MARKER, "checkpoints", "config.yaml", "rows", "server"]


def test_a_run_without_its_configuration_is_not_gone_on_with(old):
    (old / "config.yaml").unlink()
    for way in ("resume=auto", "resume=never"):
        with pytest.raises(ConfigError, match=r"holds what is left of a run whose config.yaml is gone; use overwrite="):
            claim(old, way)
    claim(old, "overwrite=true")


def test_a_comparison_deletes_no_more_than_finished_runs_and_shared_work(old, tmp_path):
    said = []
    display = SimpleNamespace(say=said.append)
    (old / "notes.txt").write_text("mine")
    _delete_run(RunFolder(old), display)
    assert len(said) == 1
    assert re.match(r"kept .*old: output_dir .* is not deleted: no run made .*notes.txt; move that away", said[0])
    (old / "notes.txt").unlink()
    _delete_run(RunFolder(old), display)
    assert not old.exists()
    shared = SharedWork(tmp_path / "shared")
    for name in ("proxies/mine/model", f"proxies/{'0' * 32}/proxy", f"federations/{'1' * 32}.part/x"):
        (shared.folder / name).mkdir(parents=True)
    shared.clear()
    assert sorted(content(shared.folder)) == ["proxies", "proxies/mine", "proxies/mine/model"]


@pytest.mark.parametrize("where", ["overrides", "methods.a"])
def test_a_study_file_never_asks_to_overwrite(tmp_path, where):
    node = {"recipe": "fedproxy_tiny", **({"overwrite": True} if where != "overrides" else {})}
    study = {"methods": {"a": node}, "overrides": {"overwrite": True} if where == "overrides" else {}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    with pytest.raises(ConfigError, match=rf"^{where}.overwrite is not a key of a comparison; delete the record of"):
        read_study([f"study={tmp_path}/study.yaml"])


def test_a_copied_recipe_never_lands_on_what_is_there(tmp_path):
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    (tmp_path / "mine.yaml").write_text("mine: true")
    for name in ("link", "mine"):
        with pytest.raises(ConfigError, match="exists; give another file name"):
            recipes.main(["cp", "fedproxy_tiny", str(tmp_path / f"{name}.yaml")])
    assert not (tmp_path / "elsewhere.yaml").exists()


def test_notes_among_fused_models_and_in_scratch_stop_a_continuation_before_work(made, old):
    same = ("resume=auto", "distillation.steps=1", "distillation.rows=16", "client.batch_size=16", "trainer.logger=csv",
            "trainer.log_every_n_steps=1")  # fmt: skip
    (old / "fused" / "notes.txt").write_text("mine")
    claim(old, *same)  # nothing is fused again
    with pytest.raises(ConfigError, match=r"fused/notes.txt lies where the run puts its own files, and no run made it"):
        claim(old, *same, "federation.rounds=2")
    (old / "fused" / "notes.txt").unlink()
    (old / "exchange").mkdir()
    (old / "exchange" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"exchange/mine.txt lies where"):
        claim(old, *same)


def test_what_clients_own_is_closed_to_others_whatever_the_umask(run_tiny, tmp_path):
    before = os.umask(0)
    try:
        run_tiny(*QUICK, folder=tmp_path / "out")
    finally:
        os.umask(before)
    for name in ("server", "rows", "checkpoints"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o700, name
    assert (tmp_path / "out" / "partition.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "out" / "rows").chmod(0o755)  # as older versions left it
    claim(tmp_path / "out", "resume=auto")
    assert (tmp_path / "out" / "rows").stat().st_mode & 0o777 == 0o700
    pool = WorkerPool(RemoteClient("x:y"), tmp_path / "new" / "exchange", size=1, threads=1)
    assert (tmp_path / "new" / "exchange").stat().st_mode & 0o777 == 0o700
    pool.close()


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [LAUGHS, "[" * 5000, "a: !!python/name:os.system\n", "- a\n", "a: [\nb: c", "\x00"])
def test_the_configuration_of_a_foreign_run_is_read_like_a_recipe(old, text):
    (old / "config.yaml").write_text(text)
    before = content(old)
    with pytest.raises(FedProxyError, match=r"^configuration .*config.yaml .*overwrite=true") as caught:
        claim(old, "resume=auto")
    assert str(caught.value).isprintable()
    assert content(old) == before

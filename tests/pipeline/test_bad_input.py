"""Whatever a user or a file can get wrong is one line, and nothing that was there is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from fedproxy.errors import ClientError, ConfigError, DataError, EvaluationError, FedProxyError, ModelError
from fedproxy.names import file_stem
from fedproxy.reporting import RunReport

QUICK = ("federation.rounds=1", "evaluation.models=[]")


def rows(path: Path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def own_data(path):
    return ("data.tasks=[]", "evaluation.tasks=[tiny_sums]", f"data.files.ward={path}")


def test_the_command_prints_one_line_and_exits_with_two(tmp_path):
    command = [sys.executable, "-m", "fedproxy.fit", "recipe=fedproxy_tinny", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: recipe=fedproxy_tinny: unknown recipe; did you mean 'fedproxy_tiny'?\n"
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("trainer.acelerator=cpu", ConfigError, r"trainer.acelerator: .* did you mean 'accelerator'"),
        ("data.tasks=[tiny_sum]", EvaluationError, r"tiny_sum'?.*tiny_sums"),
        ("target.path=asset:tiny-lama", FedProxyError, r"tiny-lama.*tiny-llama"),
        ("target.path=./nowhere", ModelError, r"^./nowhere is no folder; give an asset"),
        ("trainer.devices=0", ConfigError, r"trainer.devices must be auto \(one per client\), a number .*, got 0"),
        ("trainer.precision=bf16-true", ConfigError, r"trainer.precision=bf16-true converts what is trained.*32-true"),
        ("trainer.precision=foo", ConfigError, r"trainer.precision must be .* got 'foo'"),
        ("trainable.modules=[q_prj]", ConfigError, r"trainable.modules: .* 'q_prj'; did you mean 'q_proj'\?"),
        ("compression.calibration.path=missing.jsonl", DataError, r"missing.jsonl"),
        ("federation.clients_per_round=9", ConfigError, r"federation.clients_per_round must be at most the 4 clients"),
        ("regularizer.name=feddyn", ConfigError, r"'feddyn' and server optimizer 'none' do not go together"),
        ("aggregator.name=fedex_lora", ConfigError, r"'fedex_lora' is defined in product space, got 'factors'"),
        ("federation.min_clients=0", ConfigError, r"federation.min_clients must be at least 1, or null for all, got 0"),
        ("federation.min_clients=9", ConfigError, r"federation.min_clients must be at most the 4 clients there are, g"),
        ("federation.round_timeout_s=0", ConfigError, r"federation.round_timeout_s must be positive, or null, got 0"),
        ("federation.max_norm_ratio=1", ConfigError, r"federation.max_norm_ratio must be above 1, or null, got 1"),
        (
            "data.partition={name: file, path: no.json}",
            DataError,
            r"data.partition.path=no.json cannot be read as JSON",
        ),
    ],
)
def test_a_recipe_that_cannot_be_done(run_tiny, override, error, message):
    with pytest.raises(error, match=message) as caught:
        run_tiny(*QUICK, *(["regularizer.name=none"] if "aggregator" in override else []), override)
    assert "\n" not in str(caught.value)


def test_more_questions_than_there_are_cannot_be_scored(run_tiny):
    message = r"evaluation.limit 100000 is above the 200 questions of tiny_"
    with pytest.raises(EvaluationError, match=message):
        run_tiny(*QUICK[:1], "evaluation.models=[target]", "evaluation.limit=100000")


def test_too_many_clients_per_round_are_refused_before_anything_is_made(run_tiny, tmp_path):
    message = "^federation.clients_per_round must be at most the 4 clients there are, got 5$"
    with pytest.raises(ConfigError, match=message):
        run_tiny(*QUICK, "federation.clients_per_round=5", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_data_file(run_tiny, tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl"):
        run_tiny(*QUICK, *own_data(tmp_path / "gone.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "target": ', r"rows.jsonl.*3"),
        ({"prompt": "a"}, r"rows.jsonl.*3.*target"),
        ({"prompt": "a", "target": ""}, r"rows.jsonl.*3.*target"),
    ],
)
def test_a_broken_row_is_named(run_tiny, tmp_path, line, message):
    good = {"prompt": "Question: one?\nAnswer:", "target": " one"}
    with pytest.raises(DataError, match=message):
        run_tiny(*QUICK, *own_data(rows(tmp_path / "rows.jsonl", good, good, line)))


def test_an_empty_client_is_named(run_tiny, tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl"):
        run_tiny(*QUICK, *own_data(rows(tmp_path / "rows.jsonl")))


def test_a_target_that_is_no_decoder(run_tiny, tmp_path):
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"is an encoder-decoder model \(t5\)"):
        run_tiny(*QUICK, f"target.path={tmp_path / 't5'}")


def test_a_clients_fault_names_client_and_round_and_keeps_what_was_done(run_tiny, monkeypatch):
    from fedproxy.federation.client.site import Site

    train = Site.train

    def fail(self, broadcast, client_id):
        if broadcast.round == 2 and client_id == "tiny_places":
            raise RuntimeError("out of\nmemory")
        return train(self, broadcast, client_id)

    _, folder = run_tiny("federation.rounds=1", "evaluation.models=[]")
    with monkeypatch.context() as patch:
        patch.setattr(Site, "train", fail)
        log = f"checkpoints/logs/{file_stem('tiny_places')}.log"
        said = f"RuntimeError; details in the client's log {log}"
        message = f"client 'tiny_places' failed in round 2: {said}; that leaves 3 of 4 clients, and"
        with pytest.raises(ClientError, match=message):
            run_tiny("federation.rounds=2", "evaluation.models=[]", "resume=auto", folder=folder)
    report = RunReport.load(folder)  # of the round that was finished before
    assert (report.run.status, len(report.rounds)) == ("completed", 1)
    assert "out of\nmemory" in (folder / log).read_text()
    report, _ = run_tiny("federation.rounds=2", "evaluation.models=[]", "resume=auto", folder=folder)
    assert (report.run.status, len(report.rounds)) == ("completed", 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(run_tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FedProxyError, match=r"cannot be written"):
        run_tiny(*QUICK, folder=tmp_path / "out")


def test_interrupt_says_how_to_go_on(run_tiny, monkeypatch):
    from fedproxy.federation.client.site import Site

    def interrupt(self, broadcast, client_id):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Site, "train", interrupt)
        with pytest.raises(KeyboardInterrupt, match="go on with the same command and resume=auto"):
            run_tiny(*QUICK)

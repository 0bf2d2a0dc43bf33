"""A finished run is recognised before anything heavy is imported, and only if nothing that counts has changed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedproxy import fit
from fedproxy.errors import CheckpointError
from fedproxy.pipeline.finished import finished

FAST = ("data.rows_per_task=8", "federation.rounds=1", "evaluation.limit=2", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Words of a finished run, without resume, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["recipe=fedproxy_tiny", *FAST, f"output_dir={folder}"]
    fit.main(words)
    return words, folder


def test_nothing_heavy_is_imported(run):
    words, folder = run
    program = (
        "import sys; from fedproxy.fit import main; main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'lightning', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *words, "resume=auto"], capture_output=True, text=True)
    assert done.stderr == "this run is finished; nothing left to do\n"
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mean acc_norm over 4 tasks")
    assert lines[-2:] == [f"report: {folder}/report.md (and report.html, report.json)", "[]"]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("overwrite=true",),
        ("resume=auto", "federation.rounds=2"),
        ("resume=auto", "accept_changed=[target]"),
    ],
)
def test_another_command_looks_closer(run, more):
    words, _ = run
    assert finished([*words, "resume=auto"]) is not None
    assert finished([*words, *more]) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("report.json", lambda text: text.replace("completed", "complete")),
        ("server/finished.json", lambda text: json.dumps({**json.loads(text), "fedproxy": "0.0.1"})),
        ("server/finished.json", lambda text: text[:-9]),
        ("config.yaml", lambda text: None),
    ],
)
def test_a_changed_folder_looks_closer(run, name, change):
    words, folder = run
    path = Path(folder, name)
    before = path.read_text()
    after = change(before)
    path.unlink()
    try:
        if after is not None:
            path.write_text(after)
        assert finished([*words, "resume=auto"]) is None
    finally:
        path.write_text(before)
    assert finished([*words, "resume=auto"]) is not None


@pytest.mark.parametrize(
    "lost",
    ["fused", "fused/model.safetensors", "adapter", "evaluation/fused.samples.jsonl", "report.md", "report.html"],
)
def test_what_is_gone_is_made_again(run, lost, tmp_path, capsys):
    words, folder = run
    kept = shutil.move(folder / lost, tmp_path / "kept")
    fit.main([*words, "resume=auto"])
    assert f"{folder / lost}" in capsys.readouterr().err.replace("\n", "")
    made = folder / lost
    for path in [kept] if kept.is_file() else kept.rglob("*.safetensors"):
        again = made if kept.is_file() else made / path.name
        assert again.suffix in (".md", ".html") or again.read_bytes() == path.read_bytes()
    assert finished([*words, "resume=auto"]) is not None


def test_half_a_fused_model_is_made_again(run):
    words, folder = run
    weights = folder / "fused/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    fit.main([*words, "resume=auto"])
    assert weights.read_bytes() == whole


def test_a_lost_proxy_is_named_and_the_report_stays(run, tmp_path):
    words, folder = run
    report = (folder / "report.json").read_bytes()
    shutil.move(folder / "proxy", tmp_path / "proxy")
    with pytest.raises(CheckpointError, match=r"proxy/config\.json cannot be read: No such file .*; put back a copy"):
        fit.main([*words, "resume=auto"])
    assert (folder / "report.json").read_bytes() == report
    shutil.move(tmp_path / "proxy", folder / "proxy")
    assert finished([*words, "resume=auto"]) is not None


def test_questions_in_files_are_looked_at_each_time(run, tmp_path):
    words, _ = run
    rows = [json.dumps({"prompt": f"Say {number}:", "target": number}) for number in ("one", "two", "three")]
    (tmp_path / "own.jsonl").write_text("\n".join(rows) + "\n")
    asked = [*words[:-1], f"evaluation.files.own={tmp_path}/own.jsonl", f"output_dir={tmp_path}/run", "resume=auto"]
    fit.main(asked)
    assert finished(asked) is None


def test_a_full_disk_at_the_note_is_no_error(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    words, _ = run
    monkeypatch.setattr("fedproxy.pipeline.finished.write_json", full)
    fit.main([*words[:-1], f"output_dir={tmp_path}/run"])
    assert not (tmp_path / "run/server/finished.json").exists()
    assert (tmp_path / "run/report.json").is_file()

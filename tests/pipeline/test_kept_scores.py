"""A second run that asks the same of the same model takes its scores over, says so, and ends with the same bits."""

import json
import os
import re
import stat

import pytest

from fedproxy.config import load_config
from fedproxy.data.assets import cache_root, resolve
from fedproxy.errors import ConfigError
from fedproxy.evaluation.evaluators.lm_eval import LmEval
from fedproxy.evaluation.evaluators.own_data import OwnData
from fedproxy.evaluation.results import EvaluationResult
from fedproxy.models import load_model, load_tokenizer
from fedproxy.pipeline import kept_scores as module
from fedproxy.pipeline.kept_scores import KeptScores, kept_scores
from fedproxy.pipeline.reuse import SharedWork, model_key
from fedproxy.pipeline.run import compress_only, run

from .lines import Lines

SMALL = (
    "recipe=fedproxy_tiny",
    "data.tasks=[tiny_sums,tiny_colors]",
    "data.rows_per_task=8",
    "evaluation.limit=6",
    "evaluation.models=[target,proxy]",
    "federation.rounds=0",
)
SAID = re.compile(r"(target|proxy): scores taken over from an equal evaluation \(lm_eval of 20\d\d-.*\)")


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """The folder of scores, in a cache of its own."""
    monkeypatch.setenv("FEDPROXY_SCORES_MIB", "64")
    monkeypatch.setattr(module, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache/scores"


@pytest.fixture
def asked(monkeypatch):
    """The evaluators that were asked, in order."""
    names = []

    def counted(cls):
        plain = cls.score

        def score(self, *arguments, **options):
            names.append(self.name)
            return plain(self, *arguments, **options)

        monkeypatch.setattr(cls, "score", score)

    counted(LmEval)
    counted(OwnData)
    return names


def go(folder, *words, shared=None):
    """Run, and return the report's content without times and places, and the lines that were said."""
    display = Lines()
    run(load_config([*SMALL, f"output_dir={folder}", *words]), display, shared)
    report = json.loads((folder / "report.json").read_text())
    del report["cost"], report["run"]
    return report, display.lines


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "evaluation").glob("*.samples.jsonl"))}


def test_two_recipes_of_one_target_score_it_once(scores, asked, tmp_path):
    first, lines = go(tmp_path / "first")
    assert asked == ["lm_eval", "lm_eval"]
    assert not [line for line in lines if SAID.fullmatch(line)]
    second, lines = go(tmp_path / "second", "aggregator.name=fedavg", "method=other")
    assert asked == ["lm_eval", "lm_eval"]  # the proxy is the same too
    said = [line for line in lines if SAID.fullmatch(line)]
    assert [line.split(":")[0] for line in said] == ["target", "proxy"]
    assert second["notes"] == [*first["notes"], *said]
    assert {**second, "notes": first["notes"]} == first
    assert files(tmp_path / "first") == files(tmp_path / "second")
    alone, _ = go(tmp_path / "alone", "evaluation.models=[target]", "compression.ratio=0.34")
    assert alone["scores"]["target"] == first["scores"]["target"]
    assert len(asked) == 2
    assert len(list(scores.iterdir())) == 2


def test_a_run_that_goes_on_keeps_what_it_took_over_and_scores_what_is_asked_anew(scores, asked, tmp_path):
    go(tmp_path / "first")
    before, _ = go(tmp_path / "second", "resume=auto")
    (tmp_path / "second/report.json").unlink()
    after, _ = go(tmp_path / "second", "resume=auto")
    assert after == before
    assert len(asked) == 2
    for change in ("evaluation.limit=5", "evaluation.num_fewshot=1", "evaluation.seed=7", "evaluation.batch_tokens=77"):
        count = len(asked)
        go(tmp_path / "third", change, "overwrite=true")
        assert len(asked) == count + 2, change


def test_a_changed_target_a_changed_template_and_damaged_entries_are_scored(scores, asked, tmp_path):
    go(tmp_path / "first", "evaluation.models=[target]")
    (entry,) = scores.iterdir()
    content = entry.read_text()
    for damaged in (content[:-20], content.replace('"acc": ', '"acc": 1', 1), "{}"):
        entry.write_text(damaged)
        count = len(asked)
        _, lines = go(tmp_path / "next", "evaluation.models=[target]", "overwrite=true")
        assert len(asked) == count + 1
        (line,) = [line for line in lines if line.startswith("kept scores: ")]
        assert str(entry) in line
        assert line.endswith("it is not used")
    other = entry.with_name(f"{'0' * 64}.json")
    other.write_text(entry.read_text())
    lines = []
    assert KeptScores(scores).read("0" * 64, lines.append) is None  # the entry of another key
    assert lines == [f"kept scores: {other} holds other scores; it is not used"]
    path = resolve("asset:tiny-llama")
    model, tokenizer = load_model(path), load_tokenizer(path)
    plain = model_key(model, tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert model_key(model, tokenizer) != plain
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = 5
    assert model_key(model, tokenizer) != plain


def test_clients_held_out_rows_stay_in_the_run_or_its_comparison(scores, asked, tmp_path):
    held = ("data.holdout=2", "evaluation.models=[target]")
    go(tmp_path / "first", *held)
    go(tmp_path / "second", *held, "aggregator.name=fedavg")
    assert asked == ["lm_eval", "own_data", "own_data"]
    assert "held_out/" in (tmp_path / "first/evaluation/target.samples.jsonl").read_text()
    (entry,) = scores.iterdir()
    assert "held_out/" not in entry.read_text()
    shared = SharedWork(tmp_path / "shared")
    first, _ = go(tmp_path / "third", *held, shared=shared)
    second, _ = go(tmp_path / "fourth", *held, "aggregator.name=fedavg", shared=shared)
    assert len(asked) == 5
    assert first == second  # a comparison's reports need not say what its runs share
    assert list(scores.iterdir()) == [entry]


def test_rows_of_ones_own_are_taken_over_by_their_content(scores, asked, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 =", "target": " 2"}\n')
    words = ("evaluation.tasks=[]", f"evaluation.files.mine={rows}", "evaluation.models=[target]")
    first, _ = go(tmp_path / "first", *words)
    second, _ = go(tmp_path / "second", *words)
    assert first["scores"] == second["scores"]
    assert asked == ["own_data"]
    rows.write_text('{"prompt": "1 + 1 =", "target": " 3"}\n')
    go(tmp_path / "third", *words)
    assert asked == ["own_data"] * 2


def test_the_proxys_own_command_leaves_scores_to_fit(scores, asked, tmp_path):
    compress_only(load_config([*SMALL, f"output_dir={tmp_path / 'first'}"]), Lines())
    go(tmp_path / "second")
    assert asked == ["lm_eval", "lm_eval"]


RESULT = EvaluationResult({"t": {"acc": 0.5}}, {"acc": 0.5}, [{"task": "t", "nll": [1 / 3, 2.0]}], {"n": {}}, 1.0)


def test_entries_are_the_owners_alone_and_the_oldest_go(tmp_path):
    lines = []
    kept = KeptScores(tmp_path / "scores")
    keys = [f"{number:064x}" for number in range(4)]
    for number, key in enumerate(keys):
        kept.write(key, RESULT, lines.append)
        os.utime(kept.folder / f"{key}.json", (number, number))
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.folder.iterdir()} == {0o600}
    assert kept.read(keys[0], lines.append)[0] == RESULT  # used now: it stays
    size = (kept.folder / f"{keys[0]}.json").stat().st_size
    for name in ("mine.json", f".{keys[1]}.abcdefgh"):
        (kept.folder / name).write_text("")
    os.utime(kept.folder / f".{keys[1]}.abcdefgh", (0, 0))  # of a run that was killed
    KeptScores(kept.folder, max_bytes=3.5 * size).write("f" * 64, RESULT, lines.append)
    left = sorted(path.name for path in kept.folder.iterdir())
    assert left == sorted(["mine.json", *(f"{key}.json" for key in (keys[0], keys[3], "f" * 64))])
    KeptScores(kept.folder, max_bytes=1.0).write("e" * 64, RESULT, lines.append)
    assert [path.name for path in kept.folder.iterdir()] == ["mine.json"]
    assert lines == []


def test_a_cache_that_cannot_be_used_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    kept = KeptScores(tmp_path / "file/scores")
    assert kept.read("0" * 64, lines.append) is None
    kept.write("0" * 64, RESULT, lines.append)
    assert lines == [f"scores are not kept for other runs: {kept.folder} cannot be written (Not a directory)"]


@pytest.mark.parametrize("given", ["many", "-1", "nan"])
def test_a_size_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv("FEDPROXY_SCORES_MIB", given)
    with pytest.raises(ConfigError, match=r"FEDPROXY_SCORES_MIB must be a number of MiB of at least 0, .*; unset it"):
        kept_scores(None)


def test_where_scores_lie_and_how_to_keep_none(monkeypatch):
    monkeypatch.setenv("FEDPROXY_SCORES_MIB", "")
    assert kept_scores(None) == KeptScores(cache_root() / "scores", 256 * 2**20)
    monkeypatch.setenv("FEDPROXY_SCORES_MIB", "0")
    assert kept_scores(None) is None

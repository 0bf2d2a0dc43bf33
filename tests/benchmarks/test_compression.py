"""The script behind the figures of compression: its targets, and that it runs on the tiny model."""

import json

import pytest

from benchmarks import compression

GOOD = {"influence_pass": {"time_ratio": 1.1, "memory_ratio": 0.49}, "distillation": {"ratio": 1.5}}
TINY = ["--target", "asset:tiny-llama", "--calibration", "asset:tiny-calibration", "--rows", "32", "--texts", "2"]


@pytest.mark.parametrize(
    ("part", "figure", "value", "line"),
    [
        ("influence_pass", "time_ratio", 1.101, r"influence pass takes 1.101 times the seconds.*at most 1.1 are"),
        ("influence_pass", "memory_ratio", 0.5, r"influence pass takes 0.500 times the memory.*less than 0.5"),
        ("distillation", "ratio", 1.499, r"cache is 1.499 times as fast as without, at least 1.5"),
    ],
)
def test_a_missed_target_is_one_line_and_exit_code_one(monkeypatch, tmp_path, part, figure, value, line):
    figures = {**GOOD, part: {**GOOD[part], figure: value}}
    monkeypatch.setattr(compression, "compressors", lambda *_: {})
    for name in ("influence_pass", "distillation"):
        monkeypatch.setattr(compression, name, lambda *_, name=name: figures[name])
    with pytest.raises(SystemExit, match=line) as caught:  # text as exit status: printed to stderr, and the code is 1
        compression.main([*TINY, "--json", str(tmp_path / "figures.json")])
    assert str(caught.value).count("missed: ") == 1
    assert json.loads((tmp_path / "figures.json").read_text())[part][figure] == value  # kept all the same


def test_figures_on_the_target_meet_it_and_memory_that_is_unknown_is_not_judged():
    assert compression.missed_targets(GOOD) == []
    unknown = {**GOOD, "influence_pass": {"time_ratio": 1.0, "memory_ratio": None}}
    assert compression.missed_targets(unknown) == []
    bad = {"influence_pass": {"time_ratio": 2.0, "memory_ratio": 1.0}, "distillation": {"ratio": 1.0}}
    assert len(compression.missed_targets(bad)) == 3


def test_the_script_measures_all_compressors_the_pass_and_distillation(tmp_path, capsys):
    # Whether a tiny model meets the targets is a matter of luck; what is said must be what was measured.
    ended = ""
    try:
        compression.main([*TINY, "--repeats", "1", "--steps", "2", "--json", str(tmp_path / "figures.json")])
    except SystemExit as stopped:
        ended = stopped.code
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert ended == "\n".join(compression.missed_targets(figures))
    printed = capsys.readouterr().out
    assert ("all targets are met" in printed) == (ended == "")
    assert set(figures["compressors"]) == set(compression.COMPRESSORS)
    assert all(row["score_seconds"] >= 0 < row["build_seconds"] for row in figures["compressors"].values())
    timed = figures["influence_pass"]
    assert timed["time_ratio"] == timed["seconds"]["influence"] / timed["seconds"]["hidden_states"]
    speeds = figures["distillation"]["tokens_per_second"]
    assert figures["distillation"]["ratio"] == speeds["with cache"] / speeds["without cache"]
    assert f"influence / hidden_states: time {timed['time_ratio']:.2f}" in printed

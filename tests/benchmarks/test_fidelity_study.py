"""The study of proxies' fidelity on the tiny model: its rows, its tables, and that nothing is done twice."""

import json

import pytest

from benchmarks import fidelity_study

WORDS = ["--target", "asset:tiny-llama", "--calibration", "asset:tiny-calibration", "--tasks", "tiny_sums"]
WORDS += ["--rules", "uniform", "random_0", "random_1", "--limit", "8", "--steps", "1", "--recipe", ""]
ROWS = {"target"} | {f"{rule}_2{tail}" for rule in ("uniform", "random_0", "random_1") for tail in ("", "_distilled")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Results of two blocks removed by three rules, and how to go on with the study."""
    folder = tmp_path_factory.mktemp("study")

    def go(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fidelity_study, "cache_root", lambda: folder / "cache")
            fidelity_study.main([*WORDS, "--results", str(folder / "fidelity"), *words])

    go("--removed", "2")
    return folder, go


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "fidelity").glob("*.json")}


def test_every_row_is_measured(study):
    folder, _ = study
    found = results(folder)
    assert set(found) == ROWS
    assert found["target"]["kl"] == pytest.approx(0, abs=1e-6)
    for name in ROWS - {"target"}:
        assert found[name]["kl"] > 0
        assert len(found[name]["kept"]) == 4  # of six
        assert found[name]["parameters"] < found["target"]["parameters"]
        assert found[name]["steps"] == name.endswith("_distilled")
    assert found["uniform_2"]["kl"] != found["uniform_2_distilled"]["kl"]
    assert found["uniform_2"]["kept"] == [0, 1, 4, 5]  # first: 2, last: 2


def test_the_table_has_a_line_per_rule_and_means_over_seeds(study):
    folder, _ = study
    lines = (folder / "fidelity.md").read_text().splitlines()
    start = lines.index("## 2 blocks' worth removed")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 4 :]]
    labels = ["target", "uniform", "uniform, distilled", "random (2 seeds)", "random (2 seeds), distilled"]
    assert [row[0] for row in cells] == labels
    found = results(folder)
    assert cells[1][1] == f"{found['uniform_2']['kl']:.3f}"
    low, high = sorted(found[f"random_{seed}_2"]["kl"] for seed in (0, 1))
    assert cells[3][1] == f"{(low + high) / 2:.3f} ({low:.2f} to {high:.2f})"


def test_nothing_that_is_there_is_done_again(study, monkeypatch):
    folder, go = study
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "fidelity").iterdir()}
    done, row = [], fidelity_study.Study.row

    def note(self, rule, removed, distilled):
        done.append((rule, removed, distilled))
        return row(self, rule, removed, distilled)

    monkeypatch.setattr(fidelity_study.Study, "row", note)
    table = (folder / "fidelity.md").read_text()
    (folder / "fidelity.md").unlink()
    go("--removed", "2")
    assert done == []
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "fidelity").iterdir()} == before
    assert (folder / "fidelity.md").read_text() == table

    # One row is lost and another number of blocks is asked for, without anything but the table: nothing runs.
    lost = folder / "fidelity" / "random_1_2.json"
    kept = lost.read_text()
    lost.unlink()
    go("--removed", "1", "2", "--table")
    assert done == []
    assert "| random | " in (folder / "fidelity.md").read_text()  # one seed is left
    go("--removed", "2")
    assert done == [("random_1", 2, False)]
    again, old = json.loads(lost.read_text()), json.loads(kept)
    assert {name: again[name] for name in ("kl", "kept", "scores")} == {
        name: old[name] for name in ("kl", "kept", "scores")
    }


def test_fused_rows_are_a_table_of_their_own():
    def scores(*accuracies):
        models = ("proxy", "proxy_tuned", "fused")
        pairs = zip(models, accuracies, strict=True)
        return {"scores": {name: {"acc_norm": a, "acc_norm_stderr": 0.015, "answer_nll": 3.25} for name, a in pairs}}

    found = {"fused_plain": scores(0.25, 0.3, 0.4), "fused_distilled_delta": scores(0.35, 0.375, 0.5)}
    assert fidelity_study.fused_table(found)[-2:] == [
        "| plain | 25.0 ± 1.5 | 30.0 ± 1.5 | 40.0 ± 1.5 | 3.25 |",
        "| distilled, delta | 35.0 ± 1.5 | 37.5 ± 1.5 | 50.0 ± 1.5 | 3.25 |",
    ]
    assert fidelity_study.fused_table({"target": scores(0.25, 0.3, 0.4)}) == []

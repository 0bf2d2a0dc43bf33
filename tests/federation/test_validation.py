import math

import pytest
import torch

from fedproxy.errors import CheckpointError
from fedproxy.federation.server.checkpoint import CheckpointFolder, Progress
from fedproxy.federation.server.validation import RoundValidation, best_round


def record(number, value=None, metric="answer_nll"):
    return {"round": number, **({} if value is None else {"validation": {"mean": {metric: value}}})}


def validation(every=1, keep_best=True, score=lambda state: {"mean": {"answer_nll": 1.0}}):
    return RoundValidation(score, every, "answer_nll", keep_best)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("answer_nll", [3.0, 2.0, 2.5], 2),  # lower is better
        ("perplexity", [3.0, 2.0, 2.5], 2),
        ("acc", [0.3, 0.2, 0.5], 3),  # higher is better
        ("acc", [0.3, 0.5, 0.5], 2),  # of equals the earlier
        ("answer_nll", [None, 2.0, None], 2),  # rounds without validation
        ("answer_nll", [math.nan, 4.0, -math.inf], 2),  # a state that diverged
        ("answer_nll", [None, math.nan], None),
        ("acc", [], None),
    ],
)
def test_best_round(metric, values, best):
    assert best_round([record(i, value, metric) for i, value in enumerate(values, 1)], metric) == best


def test_a_source_with_an_unknown_mean_is_no_candidate():
    assert best_round([{"round": 1, "validation": {"mean": {"acc": None}}}], "acc") is None


def test_the_state_is_scored_every_few_rounds():
    seen = []
    found = validation(every=2, score=lambda state: seen.append(float(state["w"])) or {"mean": {"answer_nll": 1.0}})
    records = [found.record(number, {"w": torch.tensor(float(number))}) for number in range(1, 6)]
    assert seen == [2.0, 4.0]
    assert records[0] == records[2] == records[4] == {}
    assert records[1]["validation"] == {"mean": {"answer_nll": 1.0}}
    assert records[1]["validation_seconds"] >= 0


def run(folder, values, keep_best=True):
    found, records, pinned = validation(keep_best=keep_best), [], None
    for number, value in enumerate(values, 1):
        records.append(record(number, value))
        progress = Progress(number, {"w": torch.tensor([float(number)])}, records=list(records))
        pinned = found.pinned(records)
        folder.save(progress, pinned=pinned)
    return found, progress


def test_the_best_rounds_checkpoint_stays_and_is_chosen(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    found, progress = run(folder, [3.0, 2.0, 2.5, 2.6, 2.7])
    assert folder.rounds() == [2, 4, 5]
    chosen = found.chosen(progress, folder)
    assert (chosen.round, float(chosen.state["w"])) == (2, 2.0)
    found, progress = run(folder, [3.0, 2.0, 2.5, 2.6, 2.7, 1.0])  # a better one frees the old
    assert folder.rounds() == [5, 6]
    assert found.chosen(progress, folder) is progress


def test_without_selection_the_last_round_is_used_and_nothing_is_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    found, progress = run(folder, [3.0, 2.0, 2.5, 2.6], keep_best=False)
    assert folder.rounds() == [3, 4]
    assert found.chosen(progress, folder) is progress


def test_a_best_round_that_was_deleted_is_one_line(tmp_path):
    import shutil

    folder = CheckpointFolder(tmp_path, keep=2)
    found, progress = run(folder, [3.0, 1.0, 2.5, 2.6])
    shutil.rmtree(tmp_path / "round_0002")
    with pytest.raises(CheckpointError, match=r"round_0002 is damaged"):
        found.chosen(progress, folder)

from dataclasses import replace

from fedproxy.comparison.equal_bytes import affordable_rounds, byte_budget
from tests.reporting.comparison.comparison_samples import make_record


def with_rounds(record, *costs):
    """Return the record with rounds that send so many bytes up, and nothing down."""
    line = record.report.rounds[0]
    rounds = [replace(line, round=n, upload_bytes=cost, download_bytes=0) for n, cost in enumerate(costs, start=1)]
    cost = replace(record.report.cost, upload_bytes=sum(costs), download_bytes=0)
    return replace(record, report=replace(record.report, rounds=rounds, cost=cost))


def test_rounds_beyond_the_last_cost_what_the_last_did(tmp_path):
    report = with_rounds(make_record(tmp_path / "r", "a", 1, 0.5), 10, 15).report
    # 10, 25, 40, 55 bytes after 1, 2, 3, 4 rounds
    assert [affordable_rounds(report, budget) for budget in (9, 10, 24, 25, 39, 40, 56)] == [0, 1, 1, 2, 2, 3, 4]
    for odd in (with_rounds(make_record(tmp_path / "r", "a", 1, 0.5), 10, 0).report, replace(report, rounds=())):
        assert affordable_rounds(odd, 10**9) == len(odd.rounds)  # nobody says what they cost


def test_every_method_gets_the_rounds_that_the_budget_pays_for(tmp_path):
    record = make_record(tmp_path / "r", "a", 1, 0.5)
    runs = {
        "fedot": [with_rounds(record, 5, 5, 5)],
        "fedproxy": [with_rounds(record, 20, 30, 30)],
        "central": [with_rounds(record, 1, 1, 1)],
        "zero_shot": [with_rounds(record)],
        "failed": [],
    }
    least = byte_budget(runs, "least", pooled={"central"})
    assert (least.bytes, least.rounds) == (15, {"fedot": 3, "fedproxy": 0})
    assert byte_budget(runs, "least").bytes == 3  # nobody is left out unless told so
    most = byte_budget(runs, "most", pooled={"central"})
    assert (most.bytes, most.rounds) == (80, {"fedot": 16, "fedproxy": 3})
    assert byte_budget(runs, "fedproxy", pooled={"central"}) == most
    for nothing in ("failed", "zero_shot", "central"):  # sends nothing, or has not run
        assert byte_budget(runs, nothing, pooled={"central"}) is None
    assert byte_budget({"zero_shot": runs["zero_shot"]}, "most") is None

import pytest

from fedproxy.reporting import Cost, Exposure, RoundReport, RunInfo, RunReport, with_means
from fedproxy.reporting import formatting as show
from fedproxy.reporting.markdown import markdown_table, to_markdown
from fedproxy.reporting.scores import Value
from fedproxy.reporting.tables import Table


def page(tmp_path, **changes):
    def metrics(value):
        return {"acc_norm": value, "acc_norm_stderr": 0.03, "n": 200}

    scores = with_means(
        {
            "target": {"easy": metrics(0.40), "hard": metrics(0.30)},
            "fused": {"easy": metrics(0.50), "hard": metrics(0.36)},
        }
    )
    values = {
        "run": RunInfo("tiny", "fedproxy", "completed", 42, "2026-01-02T03:04:05Z", 75.0),
        "scores": scores,
        "cost": Cost(target_parameters=134_515_008, proxy_parameters=67_257_504, upload_bytes=3 * 2**20),
        "exposure": Exposure(0.5, 0.021, None),
        "rounds": (RoundReport(1, ("a", "b"), train_loss=(2.0, 3.0), weights=(0.4, 0.6), conflict_mean=0.25),),
    }
    return to_markdown(RunReport(**{**values, **changes}), tmp_path / "tiny")


def test_headline_tells_target_fused_and_difference(tmp_path):
    # means .35 and .43; stderr of a mean of two sqrt(2 * .03^2) / 2 = .0212, of the difference .0212 * sqrt 2 = .03
    assert "target **35.0 ± 2.1** → fused **43.0 ± 2.1**, a difference of **+8.0 ± 3.0** points" in page(tmp_path)


def test_scores_per_task_with_difference_to_target(tmp_path):
    rows = [" ".join(line.split()) for line in page(tmp_path).splitlines()]
    assert "| easy | 40.0 ± 3.0 | 50.0 ± 3.0 (+10.0) | acc_norm | 200 |" in rows
    assert "| **mean** | **35.0 ± 2.1** | **43.0 ± 2.1 (+8.0)** | **acc_norm** | **400** |" in rows


def test_cost_exposure_rounds_and_repeat(tmp_path):
    text = page(tmp_path)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "| Uploaded | 3.0 MiB | clients to server, all rounds |" in rows
    assert "| Proxy | 67.3 M | parameters, 50.0 % of the target |" in rows
    assert "not a guarantee" in text
    assert "the target is 2.1 points above the proxy" in text
    assert "| 1 | 2 | 2.500 | 0.250 |" in rows  # mean of the two clients' losses; columns nobody filled are left out
    assert "regularizer" not in text
    assert "| b | 3.000 | 0.600 |" in rows
    assert f"python -m fedproxy.fit recipe={tmp_path}/tiny/config.yaml" in text


def test_dropped_clients_are_named_with_their_reason(tmp_path):
    line = RoundReport(2, ("a", "b"), train_loss=2.0, dropped={"c | d": "late"})
    rows = [" ".join(row.split()) for row in page(tmp_path, rounds=(RoundReport(1), line)).splitlines()]
    assert "| 2 | 2 | 1 | 2.000 |" in rows
    assert "| 2 | c \\| d | late |" in rows
    assert "Dropped clients" not in page(tmp_path)
    assert RoundReport(1).dropped == {}


def test_numbers_by_client_name_are_read_like_lists(tmp_path):
    line = RoundReport(1, ("a", "b"), weights={"b": 0.6, "a": 0.4}, heterogeneity={"a": 0.2, "b": 0.4})
    rows = [" ".join(row.split()) for row in page(tmp_path, rounds=(line,)).splitlines()]
    assert "| 1 | 2 | 0.300 |" in rows
    assert "| b | 0.400 | 0.600 |" in rows


def test_task_without_acc_norm_is_shown_by_acc_and_so_is_the_mean(tmp_path):
    scores = with_means(
        {model: {"a": {"acc": 0.5, "acc_norm": 0.6}, "b": {"acc": 0.7}} for model in ("target", "fused")}
    )
    rows = [" ".join(line.split()) for line in page(tmp_path, scores=scores).splitlines()]
    assert "| b | 70.0 | 70.0 (0.0) | acc | \N{EN DASH} |" in rows
    assert "| **mean** | **60.0** | **60.0 (0.0)** | **acc** | **\N{EN DASH}** |" in rows


def test_run_without_scores_or_rounds_still_makes_a_page(tmp_path):
    text = page(tmp_path, scores={}, rounds=(), cost=Cost(), exposure=Exposure())
    assert "## Scores" not in text
    assert "## Rounds" not in text


def test_notes_and_hostile_names_stay_text(tmp_path):
    text = page(tmp_path, notes=("4-bit <b>weights</b>\n# not a heading",))
    assert "> **Note.** 4-bit &lt;b>weights&lt;/b> # not a heading" in text
    assert "| a\\|b |" in markdown_table(Table(["x"], [["a|b"]]))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show.size(1023), "1023 B"),
        (show.size(1536), "1.5 KiB"),
        (show.size(1024**2 - 1), "1.0 MiB"),  # 1024.0 KiB after rounding is the next unit
        (show.count(134_515_008), "134.5 M"),
        (show.duration(59.96), "1 min 00 s"),
        (show.duration(3599.6), "1 h 00 min"),
        (show.duration(8.44), "8.4 s"),
        (show.change(Value(-0.021)), "\N{MINUS SIGN}2.1"),
        (show.fixed(-0.1744), "\N{MINUS SIGN}0.174"),
        (show.fixed(-0.0001), "0.000"),
        (show.number(-1.2e-9, 2), "\N{MINUS SIGN}1.2e-09"),
        (show.score(None), "\N{EN DASH}"),
    ],
)
def test_human_numbers(shown, expected):
    assert shown == expected

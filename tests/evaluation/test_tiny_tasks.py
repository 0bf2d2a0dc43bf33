from fedproxy.data.assets import fetch
from fedproxy.evaluation.harness import check_tasks
from fedproxy.evaluation.task_rows import render_rows

TASKS = ("tiny_colors", "tiny_opposites", "tiny_places", "tiny_sums")


def test_generated_tasks_are_tasks_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROXY_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch("tiny-qa", progress=False)
    check_tasks(TASKS, limit=200, num_fewshot=3)
    for task in TASKS:
        rows = render_rows(task, "train", limit=5, seed=1)
        assert all(row.target.startswith(" ") and not row.prompt.endswith(" ") for row in rows), task
        assert len({row.key for row in rows}) == 5
        assert {row.label for row in render_rows(task, "train")} > {0, 1}  # the gold choice is not always the first

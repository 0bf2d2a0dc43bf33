"""A cache that is only to be read, as one of several users may be: tasks are scored, and nothing is written there."""

import os

import pytest

from fedproxy.data.assets import tables_folder
from fedproxy.data.assets.store import _own_folder
from fedproxy.evaluation.harness import evaluate_model
from fedproxy.evaluation.task_rows import render_rows


@pytest.fixture
def read_only(cache, monkeypatch):
    """The cache, as somebody without the right to write there sees it: root may write whatever a folder says."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and may(path, mode))
    _own_folder.cache_clear()
    yield cache
    _own_folder.cache_clear()


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_task_is_scored_and_trained_on(read_only, model, tokenizer):
    before = everything(read_only)
    assert not tables_folder().is_relative_to(read_only)
    assert evaluate_model(model, tokenizer, ["arc_easy"], limit=2, num_fewshot=1).scores["arc_easy"]["n"] == 2
    assert len(render_rows("arc_easy", "train")) == 6
    assert everything(read_only) == before
    assert any(tables_folder().iterdir())


def test_what_is_made_of_it_goes_with_the_process(read_only):
    made = tables_folder()
    assert made == tables_folder()  # one for all tasks
    _own_folder().cleanup()
    assert not made.exists()


def test_a_cache_of_ones_own_keeps_the_tables(cache, model, tokenizer):
    evaluate_model(model, tokenizer, ["arc_easy"], limit=1)
    assert tables_folder() == cache / "datasets"
    assert any((cache / "datasets").iterdir())

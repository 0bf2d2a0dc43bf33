"""The script behind the figures of distillation runs on the tiny model, and says where the KL is not halved."""

import json

from benchmarks import distillation

TINY = ["--target", "asset:tiny-llama", "--tokens", "32"]


def measured(path, *words):
    try:
        distillation.main([*TINY, "--json", str(path), *words, "distillation.rows=64"])
    except SystemExit as stopped:
        return json.loads(path.read_text()), stopped.code
    return json.loads(path.read_text()), ""


def test_two_steps_do_not_halve_the_kl_and_that_is_exit_code_one(tmp_path):
    figures, ended = measured(tmp_path / "figures.json", "--part", "kl", "--steps", "2", "distillation.lr=1e-6")
    kl = figures["kl"]
    assert kl["ratio"] == kl["after"] / kl["before"]
    assert 0.9 < kl["ratio"] < 1.1  # two steps of 1e-6 change next to nothing
    assert ended == f"the KL fell to {kl['ratio']:.2f} of what it was, not to half"
    assert len(figures["kept"]) == 3  # of six blocks


def test_the_cache_is_timed_beside_the_target(tmp_path):
    figures, ended = measured(tmp_path / "figures.json", "--part", "cache", "--steps", "2")
    cache = figures["cache"]
    assert ended == ""
    assert "kl" not in figures
    assert set(cache["seconds"]) == {"live", "filling", "warm"}
    assert cache["filling_cost"] == cache["seconds"]["filling"] / cache["seconds"]["live"]
    # of each token the 64 likeliest: 4 bytes of index and of log-probability each, one more for the rest
    assert cache["bytes_per_token"] > 64 * 8 + 4

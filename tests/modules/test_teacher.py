"""Hidden states, the head alone, and the cache of what a teacher says."""

import os

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.errors import CheckpointError, ConfigError
from fedproxy.modules.divergence import forward_kl, log_outcomes
from fedproxy.modules.teacher import Head, Teacher, observe
from fedproxy.modules.teacher_cache import Entry, TeacherCache

from .test_distillation import FAMILIES, text_batches

VOCABULARY = 61


def make_cache(folder, *, top_k=8, target="a" * 64, max_bytes=2**30):
    return TeacherCache(folder, target_sha256=target, top_k=top_k, max_bytes=max_bytes)


def said(outputs):
    tokens = len(next(iter(outputs.blocks.values())))
    return outputs.distribution.outcomes(0, tokens)


@pytest.mark.parametrize("family", [*FAMILIES, "granite"])
def test_observed_states_and_the_head_alone_are_the_full_forward(family, make_model):
    model, [batch] = make_model(family), text_batches(1)
    real = batch["attention_mask"].bool()
    full = model(**batch, output_hidden_states=True)
    seen = observe(model, batch, [0, 1])
    for index in (0, 1):  # hidden_states[0] is the embedding; the last entry is after the final norm, so not looked at
        torch.testing.assert_close(seen[f"block_{index}"], full.hidden_states[index + 1][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Head(model)(seen["head"]), full.logits[real], rtol=1e-4, atol=1e-4)
    # The model is as it was.
    assert torch.equal(model(**batch).logits, full.logits)


def test_the_cache_keeps_the_likeliest_tokens_the_rest_and_the_states(make_model, tmp_path):
    model, [batch] = make_model("gemma2"), text_batches(1)
    live = Teacher(model, [1], temperature=2.0)(batch)
    everything, _ = said(live)
    cached = Teacher(model, [1], temperature=2.0, cache=make_cache(tmp_path))(batch)
    log_p, index = said(cached)
    assert index.shape == (19, 8)
    assert log_p.shape == (19, 9)
    torch.testing.assert_close(log_p[:, :8], everything.topk(8).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(19), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.blocks[1], live.blocks[1], rtol=2e-3, atol=2e-3)  # half precision


def test_a_hit_says_the_same_bits_without_running_the_teacher(make_model, tmp_path):
    model, batches = make_model("llama"), text_batches(3)
    first = Teacher(model, [0, 2], cache=make_cache(tmp_path))
    filled = [first(batch) for batch in batches]
    again = Teacher(model, [0, 2], cache=make_cache(tmp_path))
    for batch, before in zip(batches, filled, strict=True):
        now = again(batch)
        assert all(torch.equal(a, b) for a, b in zip(said(now), said(before), strict=True))
        assert all(torch.equal(now.blocks[block], before.blocks[block]) for block in (0, 2))
    assert (first.runs, again.runs) == (3, 0)


def test_all_of_the_vocabulary_is_exact(make_model, tmp_path):
    model, student, [batch] = make_model("llama"), make_model("llama", seed=1), text_batches(1)
    logits = Head(student)(observe(student, batch, [])["head"]).detach()
    everything, _ = said(Teacher(model, [0])(batch))
    log_p, index = said(Teacher(model, [0], cache=make_cache(tmp_path, top_k=VOCABULARY))(batch))
    full, part = forward_kl(everything, log_outcomes(logits)), forward_kl(log_p, log_outcomes(logits, index))
    torch.testing.assert_close(part, full, rtol=1e-5, atol=1e-6)


def test_entries_depend_on_target_text_k_temperature_block_and_precision(make_model, tmp_path):
    [one, two] = text_batches(2)
    masked = {**one, "attention_mask": one["attention_mask"].clone().index_fill_(1, torch.tensor([4, 5, 6, 7]), 0)}
    cache = make_cache(tmp_path)
    plain = cache.keys(one, [0, 1], 1.0, True)
    assert list(plain) == [None, 0, 1]
    elsewhere = [cache.keys(two, [0, 1], 1.0, True), cache.keys(masked, [0, 1], 1.0, True)]
    elsewhere.append(make_cache(tmp_path, target="b" * 64).keys(one, [0, 1], 1.0, True))
    with torch.autocast("cpu", torch.bfloat16):
        elsewhere.append(cache.keys(one, [0, 1], 1.0, True))
    names = [name for keys in (plain, *elsewhere) for name in keys.values()]
    assert len(set(names)) == 5 * 3
    # temperature and k are of the distributions alone
    for keys in (cache.keys(one, [0, 1], 2.0, True), make_cache(tmp_path, top_k=9).keys(one, [0, 1], 1.0, True)):
        assert keys[None] not in names
        assert (keys[0], keys[1]) == (plain[0], plain[1])
    assert cache.keys(one, [1], 1.0, False) == {1: plain[1]}
    assert plain == make_cache(tmp_path).keys({k: t.clone() for k, t in one.items()}, (0, 1), 1.0, True)


def test_another_proxy_finds_what_the_first_left_and_only_the_rest_is_made(make_model, tmp_path):
    model, [batch] = make_model("llama"), text_batches(1)
    Teacher(model, [0, 1], cache=make_cache(tmp_path / "shared"))(batch)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()}
    assert len(first) == 3  # distributions, block 0, block 1

    # Nothing is missing: logits alone, one of the blocks, a block without distributions.
    for blocks, distributions in (([], True), ([1], True), ([0], False)):
        teacher = Teacher(model, blocks, distributions=distributions, cache=make_cache(tmp_path / "shared"))
        outputs = teacher(batch)
        assert (teacher.runs, list(outputs.blocks)) == (0, blocks)
        assert (outputs.distribution is not None) == distributions

    # Block 2 is missing: one run, one new entry, and all that is said is what a cache of its own would say.
    mixed = Teacher(model, [1, 2], cache=make_cache(tmp_path / "shared"))
    now, alone = mixed(batch), Teacher(model, [1, 2], cache=make_cache(tmp_path / "alone"))(batch)
    assert mixed.runs == 1
    assert all(torch.equal(a, b) for a, b in zip(said(now), said(alone), strict=True))
    assert all(torch.equal(now.blocks[block], alone.blocks[block]) for block in (1, 2))
    files = {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    assert len(files) == 4
    for path in (tmp_path / "alone").iterdir():  # the same names, the same bytes
        assert files[path.name] == path.read_bytes()

    # Another temperature makes distributions anew and takes over the blocks.
    warm = Teacher(model, [0, 1, 2], temperature=2.0, cache=make_cache(tmp_path / "shared"))
    warm(batch)
    assert warm.runs == 1
    assert len(list((tmp_path / "shared").iterdir())) == 5


def test_the_head_is_left_out_where_only_a_block_is_missing(make_model, tmp_path, monkeypatch):
    model, [batch] = make_model("llama"), text_batches(1)
    Teacher(model, [], cache=make_cache(tmp_path))(batch)
    teacher = Teacher(model, [1], cache=make_cache(tmp_path))
    monkeypatch.setattr("fedproxy.modules.teacher._likeliest", lambda *_: pytest.fail("the distributions are there"))
    assert teacher(batch).blocks[1].shape == (19, 32)


def test_a_damaged_entry_is_made_again(make_model, tmp_path):
    model, [batch] = make_model("llama"), text_batches(1)
    Teacher(model, [0], cache=make_cache(tmp_path))(batch)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"\x80\x04pickle"):
            path.write_bytes(content)
            teacher = Teacher(model, [0], cache=make_cache(tmp_path))
            teacher(batch)
            assert teacher.runs == 1
            assert path.read_bytes() == whole


def entry(tokens):
    return Entry(torch.zeros(tokens, 2, dtype=torch.int32), torch.zeros(tokens, 3))  # 20 bytes a token


A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.mark.parametrize("made_by", ["modules.teacher_cache.processor", "modules.teacher_cache.torch.get_num_threads"])
def test_an_entry_of_another_machine_is_not_taken(tmp_path, monkeypatch, made_by):
    [batch], cache = text_batches(1), make_cache(tmp_path)
    before = cache.keys(batch, [0], 1.0, True)
    assert before == make_cache(tmp_path).keys(batch, [0], 1.0, True)
    monkeypatch.setattr(f"fedproxy.{made_by}", lambda: 77)
    assert not set(before.values()) & set(cache.keys(batch, [0], 1.0, True).values())


def test_files_of_others_are_never_deleted_for_room(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 9000)
    os.utime(tmp_path / "model.safetensors", (1, 1))
    cache = make_cache(tmp_path, max_bytes=5_000)
    cache.write(A, entry(200))
    make_cache(tmp_path, max_bytes=5_000).write(B, entry(200))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [B, "model"]


def test_the_bound_holds_and_old_entries_go_first(tmp_path):
    old = make_cache(tmp_path, max_bytes=10_000)
    for age, key in enumerate([A, B]):
        old.write(key, entry(200))  # 4000 bytes and a header
        os.utime(tmp_path / f"{key}.safetensors", (1000 + age, 1000 + age))
    new = make_cache(tmp_path, max_bytes=10_000)
    assert new.read(A) is not None  # used now, so B is the one to go
    new.write(C, entry(200))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [A, C]
    new.write("d" * 64, entry(200))  # everything left is this run's: nothing goes, nothing comes
    assert sorted(path.stem for path in tmp_path.iterdir()) == [A, C]
    new.write("e" * 64, entry(2000))  # larger than the bound alone
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000


def test_a_full_cache_changes_nothing_but_the_time(make_model, tmp_path):
    model, [batch] = make_model("llama"), text_batches(1)
    wanted = said(Teacher(model, [0], cache=make_cache(tmp_path / "roomy"))(batch))
    teacher = Teacher(model, [0], cache=make_cache(tmp_path / "full", max_bytes=10))
    for runs in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(said(teacher(batch)), wanted, strict=True))
        assert teacher.runs == runs
    assert not list((tmp_path / "full").iterdir())


def test_leftovers_of_a_killed_run_are_swept_and_those_of_a_live_one_stay(tmp_path):
    for name, when in ((".fedproxy-dead.part", 1000), (".fedproxy-live.part", None), ("foreign.part", 1000)):
        (tmp_path / name).write_bytes(b"x")
        if when:
            os.utime(tmp_path / name, (when, when))
    make_cache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fedproxy-live.part", "foreign.part"]


def test_nothing_half_written_stays_when_the_disk_is_full(tmp_path, monkeypatch):
    cache = make_cache(tmp_path)

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedproxy.modules.teacher_cache.save_file", full)
    with pytest.raises(CheckpointError, match=r"cache_teacher: .* cannot be written \(.*No space left.*\); free disk"):
        cache.write("a", entry(3))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"distillation.cache_teacher: .*file/cache cannot be written"):
        make_cache(tmp_path / "file" / "cache")


def test_k_beyond_the_vocabulary(make_model, tmp_path):
    with pytest.raises(ConfigError, match=r"distillation.top_k must be in \[1, 61\], the target's vocabulary, got 62"):
        Teacher(make_model("llama"), [], cache=make_cache(tmp_path, top_k=62))


def test_entries_are_what_the_design_says(make_model, tmp_path):
    model, [batch] = make_model("llama"), text_batches(1)
    Teacher(model, [1], cache=make_cache(tmp_path))(batch)
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    shapes = [{name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in files]
    assert sorted(shapes, key=sorted) == [
        {"index": (torch.int32, (19, 8)), "log_p": (torch.float32, (19, 9))},
        {"unit_1": (torch.float16, (19, 32)), "scale_1": (torch.float32, (19, 1))},
    ]

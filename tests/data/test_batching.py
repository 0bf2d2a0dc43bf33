import pytest
import torch

from fedproxy.data.batching import batches, collate
from fedproxy.data.tokenisation import Example


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "size"), [(640, 16), (10, 4), (3, 8), (1, 1)])
def test_every_example_exactly_once(count, size):
    lengths = torch.randint(5, 90, (count,), generator=make_generator(1)).tolist()
    plan = batches(lengths, size, make_generator())
    assert sorted(index for batch in plan for index in batch) == list(range(count))
    assert len(plan) == -(-count // size)
    assert sorted(map(len, plan), reverse=True)[:-1] == [size] * (len(plan) - 1)


def test_batches_have_similar_lengths_in_random_order():
    lengths = list(range(64))
    plan = batches(lengths, 8, make_generator())
    # Sorted 0..63 in eights: the range inside a batch is 7, and no padding could be less.
    assert {max(batch) - min(batch) for batch in plan} == {7}
    assert plan != sorted(plan)


def test_seed_decides_the_order_and_epochs_differ():
    lengths = [index % 7 for index in range(40)]
    generator = make_generator(3)
    first, second = batches(lengths, 8, generator), batches(lengths, 8, generator)
    assert first == batches(lengths, 8, make_generator(3))
    assert first != second


def test_window_mixes_lengths_over_the_epoch():
    lengths = list(range(64))
    plan = batches(lengths, 4, make_generator(), window=2)
    # Windows of 8 random examples cannot all be runs of 4 neighbours.
    assert max(max(batch) - min(batch) for batch in plan) > 3


def test_the_short_batch_is_not_always_the_longest_examples():
    plans = [batches(list(range(10)), 4, make_generator(seed)) for seed in range(20)]
    short = {min(next(batch for batch in plan if len(batch) == 2)) for plan in plans}
    assert short == {0, 4, 8}


def test_collate_pads_right_and_labels_targets_only():
    batch = collate([Example((5, 6, 7), ((1, 3),), "a"), Example((8, 9), ((1, 2),), "b")], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_several_targets_of_one_example_are_labelled_each():
    example = Example((5, 6, 7, 8, 9), ((1, 2), (3, 5)), "a")
    assert example.target_length == 3
    assert collate([example], pad_id=0)["labels"].tolist() == [[-100, 6, -100, 8, 9]]


def test_a_target_token_equal_to_the_pad_token_keeps_its_label():
    assert collate([Example((5, 0), ((1, 2),), "a")], pad_id=0)["labels"].tolist() == [[-100, 0]]


def test_a_batch_size_beyond_all_rows_is_one_batch():
    (batch,) = batches([3, 1, 2], 2**63 - 1, torch.Generator().manual_seed(0))
    assert sorted(batch) == [0, 1, 2]

import pytest
import torch

from fedproxy.data.packing import pack, packs
from fedproxy.data.tokenisation import Example
from fedproxy.modules.datamodule import ExampleDataModule


def test_rows_go_where_they_fit_best():
    # The longest, 10, sets the length. 7 opens a second sequence (3 left), 6 a third (4 left); 4 fits the third
    # exactly, 3 the second, and 2 needs a fourth.
    assert packs([2, 10, 3, 6, 4, 7]) == [[1], [5, 2], [3, 4], [0]]
    assert packs([5, 5, 5]) == [[0], [1], [2]]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_has_one_place_and_no_sequence_is_longer_than_the_longest_row(seed):
    lengths = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = packs(lengths)
    assert sorted(row for rows in found for row in rows) == list(range(40))
    assert all(sum(lengths[row] for row in rows) <= max(lengths) for rows in found)
    # First fit of falling lengths needs at most 11/9 of the best, which is at least the sum over the longest.
    assert len(found) <= 11 / 9 * -(-sum(lengths) // max(lengths)) + 2


def test_a_packed_batch_by_hand():
    rows = [
        Example((11, 12, 13, 14, 15), ((3, 5),), "a"),
        Example((21, 22), ((1, 2),), "b"),
        Example((31, 32), ((1, 2),), "c"),
    ]
    batch = pack(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 15], [21, 22, 31, 32, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    # The first token of a row has no label: what stands before it belongs to another row.
    assert batch["labels"].tolist() == [[-100, -100, -100, 14, 15], [-100, 22, -100, 32, -100]]
    assert pack(rows[:1] * 3, pad_id=9) is None


def test_packing_changes_no_draw():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 30, (50,), generator=generator).tolist()
    ids = [tuple(range(100 * row, 100 * row + size)) for row, size in enumerate(lengths)]
    examples = [Example(row, ((1, len(row)),), str(row[0])) for row in ids]

    def loader(packing):
        return ExampleDataModule(examples, 8, pad_id=0, generator=torch.Generator().manual_seed(1), packing=packing)

    def rows(batch):
        return sorted({int(token) // 100 for token in batch["labels"][batch["labels"] != -100]})

    plain, packed = loader(False), loader(True)
    batches = list(packed.train_dataloader())
    assert [rows(batch) for batch in plain.train_dataloader()] == [rows(batch) for batch in batches]
    assert plain.tokens_of(10**6) == packed.tokens_of(10**6) > 0
    assert any("position_ids" in batch for batch in batches)

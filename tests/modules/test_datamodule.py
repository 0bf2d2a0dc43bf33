import pytest
import torch

from fedproxy.data.batching import batches
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError
from fedproxy.modules.datamodule import ExampleDataModule


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_loader_gives_a_new_order_each_epoch_and_draws_only_when_read():
    examples = [Example(tuple(range(1, 3 + index % 5)), ((1, 2 + index % 5),), str(index)) for index in range(20)]
    data = ExampleDataModule(examples, 4, pad_id=0, generator=make_generator())
    loader = data.train_dataloader()
    iter(loader)  # Lightning asks for an iterator to check the type; that must not use up an epoch
    epochs = [[batch["input_ids"].shape for batch in loader] for _ in range(3)]
    assert len(loader) == 5
    plan = batches([len(example.input_ids) for example in examples], 4, make_generator())
    longest = [max(len(examples[index].input_ids) for index in batch) for batch in plan]
    assert [shape[1] for shape in epochs[0]] == longest
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert data.tokens_of(10**6) == 3 * sum(1 + index % 5 for index in range(20))


def test_processes_split_every_batch_and_count_by_their_tokens(monkeypatch):
    # Example i has i % 3 + 1 target tokens and its own second token.
    examples = [Example((1, *[20 + index] * (index % 3 + 1)), ((1, index % 3 + 2),), str(index)) for index in range(7)]
    parts = []
    for rank in range(2):
        monkeypatch.setattr("fedproxy.modules.datamodule.rank_and_size", lambda rank=rank: (rank, 2))
        loader = ExampleDataModule(examples, 3, pad_id=0, generator=make_generator()).train_dataloader()
        parts.append(list(loader))
        assert len(loader) == len(parts[rank]) == 3
    monkeypatch.setattr("fedproxy.modules.datamodule.rank_and_size", lambda: (0, 1))
    whole = list(ExampleDataModule(examples, 3, pad_id=0, generator=make_generator()).train_dataloader())
    assert all("share" not in batch for batch in whole)
    for step, batch in enumerate(whole):
        mine, yours = (part[step] for part in parts)
        own, others = (set(part["input_ids"][:, 1].tolist()) for part in (mine, yours))
        if len(batch["input_ids"]) == 1:  # the last row of seven: the second process repeats it for nothing
            assert (float(mine["share"]), float(yours["share"])) == (2.0, 0.0)
            continue
        assert own | others == set(batch["input_ids"][:, 1].tolist())
        assert (len(own), len(others)) == (2, 1)
        tokens = [int((part["labels"] != -100).sum()) for part in (mine, yours)]
        # The mean over two processes of share * (part's mean) is the batch's mean: share = 2 * part / all.
        assert float(mine["share"]) == pytest.approx(2 * tokens[0] / sum(tokens))
        assert float(mine["share"] + yours["share"]) == pytest.approx(2.0)


def test_empty_client():
    with pytest.raises(ClientError, match="a client has no training rows"):
        ExampleDataModule([], 4, pad_id=0, generator=make_generator())


def test_reading_batches_leaves_the_global_generator():
    data = ExampleDataModule([Example((1, 2), ((1, 2),), "a")] * 8, 4, pad_id=0, generator=make_generator())
    torch.manual_seed(0)
    wanted = torch.rand(())
    torch.manual_seed(0)
    assert len(list(data.train_dataloader())) == 2
    assert torch.rand(()) == wanted  # dropout draws from it

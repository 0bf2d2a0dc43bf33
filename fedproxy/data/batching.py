"""Batches of examples of similar length, drawn from a seeded generator, padded on the right."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fedproxy.data.examples import IGNORED
from fedproxy.data.tokenisation import Example
from fedproxy.processes import rank_and_size


def batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, *, window: int = 64
) -> list[list[int]]:
    """Split examples into batches of similar length, in random order, each example exactly once.

    The examples are shuffled and cut into windows of ``window`` batches; inside a window they are sorted by length
    (equal lengths stay shuffled) and split. The one batch that may be smaller stands at a random place of the last
    window, so that no length is favoured. Every draw depends on the generator and the lengths alone.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples of a batch.
        generator: CPU generator; it is advanced.
        window: Batches that are sorted together: more saves padding, fewer mixes lengths over the epoch.
    """
    shuffled = torch.randperm(len(lengths), generator=generator)
    tokens = torch.as_tensor(list(lengths), dtype=torch.long)
    result: list[list[int]] = []
    for chosen in torch.split(shuffled, max(1, min(batch_size * window, len(lengths)))):
        by_length = chosen[tokens[chosen].argsort(stable=True)]
        full, rest = divmod(len(chosen), batch_size)
        sizes = [batch_size] * full
        if rest:
            sizes.insert(int(torch.randint(full + 1, (), generator=generator)), rest)
        result += [part.tolist() for part in torch.split(by_length, sizes)]
    order = torch.randperm(len(result), generator=generator).tolist()
    return [result[index] for index in order]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest of them.

    Args:
        examples: The examples of one batch.
        pad_id: Token that fills up; any valid token does, since no loss and no attention fall on it.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 (batch, longest); labels are -100 except at target
        tokens, and stand at the position of the token they name (as transformers has it, not shifted).
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    attention_mask = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        for start, end in example.spans:
            labels[row, start:end] = input_ids[row, start:end]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Endless epochs of :func:`batches`: every iteration is one epoch in a new order, drawn when it is read.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples of a batch.
        generator: CPU generator of the order; each epoch advances it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> None:
        self.lengths, self.batch_size, self.generator = lengths, batch_size, generator

    def __len__(self) -> int:
        """Batches of one epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch of one epoch."""
        yield from batches(self.lengths, self.batch_size, self.generator)


class ShuffledBatches:
    """Endless epochs over fixed batches, in a new order each; further processes take every n-th.

    Args:
        batches: Collated batches.
        generator: CPU generator of the order; each epoch advances it.
    """

    def __init__(self, batches: Sequence[dict[str, Tensor]], generator: torch.Generator) -> None:
        self.batches, self.generator = batches, generator

    def __len__(self) -> int:
        """Batches of one epoch in this process."""
        return -(-len(self.batches) // rank_and_size()[1])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this process's batches of one epoch, in a new order."""
        order = torch.randperm(len(self.batches), generator=self.generator).tolist()
        rank, processes = rank_and_size()
        for step in range(len(self)):
            yield self.batches[order[(step * processes + rank) % len(order)]]

"""Batches of examples of similar length, drawn from a seeded generator, padded on the right."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError

IGNORED = -100
"""Label of tokens that no loss is taken on, as in PyTorch and transformers."""


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
    for chosen in torch.split(shuffled, batch_size * window):
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
        labels[row, example.prompt_length : length] = input_ids[row, example.prompt_length : length]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class ExampleLoader:
    """Endless epochs of collated batches: every iteration is one epoch in a new order.

    Under a distributed strategy each process takes every n-th batch, and all take equally many.

    Args:
        examples: All examples of a client.
        batch_size: Examples of a batch.
        pad_id: Token that fills up short examples.
        generator: CPU generator of the order; each epoch advances it.

    Raises:
        ClientError: If there are no examples.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, *, pad_id: int, generator: torch.Generator
    ) -> None:
        if not examples:
            raise ClientError("a client has no training rows; give it rows or leave it out of the federation")
        self.examples = examples
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.generator = generator

    def __len__(self) -> int:
        """Batches of one epoch in this process."""
        total = -(-len(self.examples) // self.batch_size)
        return -(-total // _processes()[1])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        lengths = [len(example.input_ids) for example in self.examples]
        plan = batches(lengths, self.batch_size, self.generator)
        rank, processes = _processes()
        for step in range(len(self)):
            # A last, incomplete turn starts over, so that no process waits for a batch that never comes.
            chosen = plan[(step * processes + rank) % len(plan)]
            yield collate([self.examples[index] for index in chosen], self.pad_id)

    @property
    def num_tokens(self) -> int:
        """Target tokens of one epoch."""
        return sum(example.target_length for example in self.examples)


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
        return -(-len(self.batches) // _processes()[1])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(self.batches), generator=self.generator).tolist()
        rank, processes = _processes()
        for step in range(len(self)):
            yield self.batches[order[(step * processes + rank) % len(order)]]


def _processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

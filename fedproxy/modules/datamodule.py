"""A client's examples as Lightning takes them."""

from collections.abc import Sequence

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedproxy.data.batching import LengthGroupedBatchSampler, collate
from fedproxy.data.packing import pack
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ClientError
from fedproxy.processes import rank_and_size


class ExampleDataModule(lightning.LightningDataModule):  # type: ignore[misc]
    """Training batches of similar length, in a new order each epoch.

    Processes that train one model together split every batch: a step sees the same examples whatever their number. Each
    part then holds ``share``, 0-dim float32, by which its mean loss counts: n times its part of the batch's target
    tokens, so that the mean over the n processes is the mean over all the batch's tokens.

    Args:
        examples: All examples of a client.
        batch_size: Examples of a batch.
        pad_id: Token that fills up short examples.
        generator: CPU generator of the order; each epoch advances it.
        packing: Put rows of a batch side by side where that saves padding. Batches are of the same rows either way.

    Raises:
        ClientError: If there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        pad_id: int,
        generator: torch.Generator,
        packing: bool = False,
    ) -> None:
        super().__init__()
        if not examples:
            raise ClientError("a client has no training rows; give it rows or leave it out of the federation")
        self.examples, self.pad_id, self.packing = examples, pad_id, packing
        self.sampler = LengthGroupedBatchSampler([len(own.input_ids) for own in examples], batch_size, generator)
        self._tokens: list[int] = []

    def train_dataloader(self) -> DataLoader[Example]:
        """Return the batches: ``input_ids``, ``attention_mask`` and ``labels``, see :func:`collate`."""
        # A DataLoader draws a seed for workers, by default from the generator that dropout draws from.
        options = {"batch_sampler": self.sampler, "collate_fn": self._collate, "generator": torch.Generator()}
        return DataLoader(self.examples, **options)  # type: ignore[arg-type]

    def tokens_of(self, batches: int) -> int:
        """Return the target tokens of the first batches that were handed out, of all processes together."""
        return sum(self._tokens[:batches])

    def _collate(self, whole: list[Example]) -> dict[str, Tensor]:
        tokens = sum(example.target_length for example in whole)
        self._tokens.append(tokens)
        rank, processes = rank_and_size()
        if processes == 1:
            return self._joined(whole)
        own = whole[rank::processes]  # neighbours in length go to different processes
        share = processes * sum(example.target_length for example in own) / tokens
        # A process without examples runs one that counts nothing: the others wait for it in every step.
        return {**self._joined(own or whole[:1]), "share": torch.tensor(share)}

    def _joined(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        packed = pack(examples, self.pad_id) if self.packing else None
        return collate(examples, self.pad_id) if packed is None else packed

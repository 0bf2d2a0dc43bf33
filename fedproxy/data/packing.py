"""Rows of a batch side by side in few sequences, told apart by their positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedproxy.data.examples import IGNORED, Example


def packs(lengths: Sequence[int]) -> list[list[int]]:
    """Split rows over few sequences, none longer than the longest row: the longest rows first, each where it fits best.

    Attention costs the square of a sequence's length, so that longer sequences would save nothing.

    Args:
        lengths: Tokens of each row.

    Returns:
        The rows of each sequence, by index.
    """
    most = max(lengths)
    bins: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = [(space, place) for place, space in enumerate(left) if space >= lengths[row]]
        if room:
            _, place = min(room)
        else:
            place = len(bins)
            bins.append([])
            left.append(most)
        bins[place].append(row)
        left[place] -= lengths[row]
    return bins


def pack(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor] | None:
    """Put rows into few sequences; positions begin at 0 in each row.

    transformers makes of such positions a causal mask for each row, where no attention mask is given. What fills a
    sequence up counts as one more row, which nothing attends to.

    Args:
        examples: The rows of one batch.
        pad_id: Token that fills up.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each int64 (sequences, longest); labels are as
        :func:`fedproxy.data.batching.collate` has them, and -100 at each row's first token, which nothing predicts.
        None where every row needs a sequence of its own.
    """
    chosen = packs([len(example.input_ids) for example in examples])
    if len(chosen) == len(examples):
        return None
    longest = max(sum(len(examples[row].input_ids) for row in rows) for rows in chosen)
    shape = len(chosen), longest
    ids, places, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for line, rows in enumerate(chosen):
        start = 0
        for row in rows:
            example = examples[row]
            end = start + len(example.input_ids)
            ids[line, start:end] = torch.tensor(example.input_ids)
            places[line, start:end] = torch.arange(end - start)
            for first, last in example.spans:
                own = slice(start + max(1, first), start + last)
                labels[line, own] = ids[line, own]
            start = end
        places[line, start:] = torch.arange(longest - start)
    return {"input_ids": ids, "position_ids": places, "labels": labels}

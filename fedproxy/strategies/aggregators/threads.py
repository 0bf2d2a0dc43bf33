"""Tensors side by side: one thread per tensor beats many threads on each of many small operations."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return ``work`` of every item, in order, on as many threads as torch may use; each computes with one of its own.

    So the bits of a result, which depend on how many threads share an operation, do not depend on the machine.

    Args:
        work: Called from several threads at once, with another item each.
        items: What to work on.

    Raises:
        Exception: What ``work`` raised for the first item that failed.
    """
    every, threads = list(items), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or len(every) < 2:
            return [work(item) for item in every]
        # Said in every thread: libraries of matrix products keep a number for each.
        with ThreadPoolExecutor(min(threads, len(every)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, every))
    finally:
        torch.set_num_threads(threads)

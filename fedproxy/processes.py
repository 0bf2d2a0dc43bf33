"""Which of the processes that train one model together this one is."""

import torch


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) where it trains alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

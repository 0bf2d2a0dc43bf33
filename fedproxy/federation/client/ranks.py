"""One of the processes that train a client together: the usual site, in a process group."""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh

from fedproxy.federation.client.setup import LocalSetup
from fedproxy.federation.client.site import Site
from fedproxy.models.sharding import shard
from fedproxy.modules.distributed import NAMES

PATIENCE_S = 300.0
"""How long a process waits for the others in one step: far longer than a step takes, far shorter than for ever."""


def load(
    *,
    device: int | None,
    rank: int,
    devices: Sequence[int],
    count: int,
    strategy: str,
    rendezvous: str,
    setup: Mapping[str, Any],
    patience_s: float = PATIENCE_S,
) -> Site:
    """Join the other processes, load the proxy and return the site that trains on it with them.

    Args:
        device: Which group of ``count`` accelerators these processes have; None on the CPU.
        rank: Which of the processes this is.
        devices: All accelerators that clients may use; empty where they stay on the CPU.
        count: Number of processes.
        strategy: ``ddp``, or ``fsdp`` to spread the proxy's weights over the processes.
        rendezvous: File that all processes can write, by which they find each other.
        setup: Fields of :class:`LocalSetup`.
        patience_s: Seconds that a process waits for the others in one step before it gives up.
    """
    group = list(devices)[(device or 0) * count :][:count]
    # Lightning takes these as a sign that its processes have been started already.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    kind = torch.accelerator.current_accelerator(check_available=True) if group else None
    own = torch.device("cpu") if kind is None else torch.device(kind.type, group[rank])
    if kind is not None:
        torch.accelerator.set_device_index(group[rank])
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(own),
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=patience_s),
    )
    options = LocalSetup(**setup)
    model, tokenizer = options.load(own)
    if strategy == "fsdp":
        model.rebind(shard(model.model, init_device_mesh(own.type, (count,))))
    trainer = {
        **options.trainer,
        "devices": group or count,
        "strategy": NAMES[strategy],
        "plugins": [LightningEnvironment()],
    }
    return options.in_this_process(model, tokenizer, trainer)

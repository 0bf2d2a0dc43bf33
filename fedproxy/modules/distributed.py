"""Lightning strategies for the processes that train one client together; the process group is there already."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn


class ShardedStrategy(DDPStrategy):  # type: ignore[misc]
    """For a model that is sharded before the fit (:func:`fedproxy.models.sharding.shard`), and stays so after it.

    Lightning's own ``fsdp`` wraps the model anew in every fit, which a resident model does not survive, and refuses the
    CPU. Sharding once does with neither; gradients are averaged by the sharded modules themselves.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model

    def _register_ddp_hooks(self) -> None:
        pass


NAMES = {"ddp": "fedproxy_ddp", "fsdp": "fedproxy_fsdp"}
"""Names under which Lightning makes a strategy for each Trainer, by the name in a recipe."""


def _register(name: str, kind: type[DDPStrategy], **options: Any) -> None:
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, kind, **options)


# All processes load the same bits, so nothing has to be sent before the first step; a proxy has no buffers that train.
_register(NAMES["ddp"], DDPStrategy, init_sync=False, broadcast_buffers=False)
_register(NAMES["fsdp"], ShardedStrategy)

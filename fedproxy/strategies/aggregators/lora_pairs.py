"""The clients' LoRA factors of a round, module by module: B_k and A_k after training, and their products' geometry."""

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import ClientUpdate, Tensors
from fedproxy.strategies.aggregators.cohort import Cohort
from fedproxy.strategies.aggregators.sink import Sink
from fedproxy.strategies.aggregators.survey import check_finite
from fedproxy.strategies.aggregators.threads import side_by_side
from fedproxy.strategies.functional.lowrank import A_SUFFIX, B_SUFFIX, Pair, lora_modules, product_gram, stack_pairs


def factor_names(module: str) -> tuple[str, str]:
    """Return the names of a module's B and A."""
    return module + B_SUFFIX, module + A_SUFFIX


class CohortPairs:
    """View of a cohort as LoRA pairs; a client of lower rank holds the first columns of B and the first rows of A.

    Args:
        cohort: The round's updates.
        state: The broadcast state phi^t.

    Raises:
        ClientError: If the state or an update has half a pair.
    """

    def __init__(self, cohort: Cohort, state: Tensors) -> None:
        self._cohort, self._state = cohort, state
        self.modules = lora_modules(state)
        for update in cohort.updates:
            missing = sorted({n for module in self.modules for n in factor_names(module)}.difference(update.delta))
            if missing:
                raise ClientError(
                    f"client {update.client_id!r} must send {missing[0]!r}; send both factors of every LoRA module"
                )

    @cached_property
    def others(self) -> list[str]:
        """Tensors outside LoRA, sorted."""
        paired = {name for module in self.modules for name in factor_names(module)}
        return [name for name in self._cohort.names if name not in paired]

    def start(self, module: str) -> Pair:
        """Return the broadcast (B, A)."""
        b, a = factor_names(module)
        return self._state[b].detach().cpu(), self._state[a].detach().cpu()

    def pairs(self, module: str) -> list[Pair]:
        """Return every client's (B_k, A_k), float64.

        Raises:
            ClientError: If a client's factors do not fit the state's, or are not finite.
        """
        start = self.start(module)
        return [_trained_pair(update, module, start) for update in self._cohort.updates]

    def differences(self, module: str) -> list[Pair]:
        """Return factors of B_k A_k - B A for every client, float64, of twice the client's rank."""
        return [self.difference(module, k) for k in range(len(self._cohort))]

    def difference(self, module: str, client: int) -> Pair:
        """Return one client's factors of B_k A_k - B A, by its place in the cohort; B is 0 where it moved neither."""
        b, a = self.start(module)
        pair = _trained_pair(self._cohort.updates[client], module, (b, a))
        rank = len(pair[1])
        start = b[:, :rank], a[:rank]
        moved = float(not all(torch.equal(own, before.double()) for own, before in zip(pair, start, strict=True)))
        return stack_pairs([pair, start], [moved, -moved])  # what cancels in sums alone leaves their rounding

    def gram(self, scaling: float) -> Tensor:
        """Return the inner products of the clients' whole changes: s B A per module, plain tensors elsewhere.

        Returns:
            float64 (clients, clients).
        """
        clients = len(self._cohort)
        gram = torch.zeros(clients, clients, dtype=torch.float64)
        for part in side_by_side(lambda module: product_gram(self.differences(module)), self.modules):
            gram += part * scaling**2
        for name in self.others:
            rows = torch.stack([source.whole().double().reshape(-1) for source in self._cohort.read(name)])
            part = rows @ rows.T
            check_finite(self._cohort, name, part)
            gram += part
        return gram

    def sink(self, changes: Iterable[Tensors]) -> Sink:
        """Return a sink in memory that holds the modules' merged factors already."""
        sink = Sink()
        for name, tensor in (item for change in changes for item in change.items()):
            sink.open(name, tensor.shape, tensor.dtype)
            sink.write(name, 0, tensor.reshape(-1))
        return sink

    def change(self, module: str, new: Pair) -> dict[str, Tensor]:
        """Return what turns the broadcast factors into ``new``, in the state's dtypes.

        Choice: of a product of 0, A stays as it is: a pair of zeros has no gradient and would never learn again.
        """
        start = self.start(module)
        if not any(bool(factor.any()) for factor in new):
            new = new[0], start[1].double()
        return {
            name: (after - before.double()).to(before.dtype)
            for name, before, after in zip(factor_names(module), start, new, strict=True)
        }


def _trained_pair(update: ClientUpdate, module: str, start: Pair) -> Pair:
    b, a = (update.delta[name].detach().cpu().double() for name in factor_names(module))
    rank = a.shape[0]
    if b.shape != (start[0].shape[0], rank) or a.shape[1:] != start[1].shape[1:] or rank > start[1].shape[0]:
        raise ClientError(
            f"client {update.client_id!r}: LoRA factors of {module!r} must fit B {tuple(start[0].shape)} and A "
            f"{tuple(start[1].shape)} at one rank, got {tuple(b.shape)} and {tuple(a.shape)}; "
            "use a rank up to the server's"
        )
    for name, change in zip(factor_names(module), (b, a), strict=True):
        if not bool(change.isfinite().all()):
            raise ClientError(
                f"client {update.client_id!r}: tensor {name!r} must be finite, got NaN or infinity; "
                "lower client.lr or leave the client out of the round"
            )
    return start[0][:, :rank].double() + b, start[1][:rank].double() + a

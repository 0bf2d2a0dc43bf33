"""Statistics of a client's rows that some aggregators ask for beside the update: Fisher information, Gram matrices."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedproxy.data.batching import collate
from fedproxy.data.tokenisation import Example
from fedproxy.errors import ConfigError
from fedproxy.models import placed
from fedproxy.models.modes import evaluating
from fedproxy.modules.answer_logits import answer_logits
from fedproxy.modules.losses import answer_nll
from fedproxy.protocol import ClientUpdate
from fedproxy.strategies.round_parts.base import ClientRound, Group, RoundPart, Rules
from fedproxy.strategies.trainable.base import TrainableModel


def client_statistics(
    groups: Sequence[str], model: TrainableModel, examples: Sequence[Example], *, pad_id: int, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Return the groups of statistics that an aggregator needs, of the tuned model on the client's rows.

    Args:
        groups: Names in :data:`STATISTICS`.
        model: The proxy in the client's tuned state.
        examples: The client's rows.
        pad_id: Token that fills up short rows.
        device: Where to compute.
    """
    with evaluating(model.model), placed(model.model, device):
        return {group: STATISTICS[group](model, examples, pad_id) for group in groups}


def diagonal_fisher(model: TrainableModel, examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Return the diagonal of the empirical Fisher information: the mean over rows of the squared gradient of log p.

    log p is that of a row's whole answer (Matena and Raffel 2022, arXiv 2111.09832). Choice: the answer is the row's
    own, not one drawn from the model, which a client can do in one backward pass per row.

    Returns:
        float32 per trainable parameter, in its shape, on the CPU.
    """
    parameters = model.parameters()
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for example in examples:
        batch = _to(collate([example], pad_id), model)
        loss = answer_nll(*answer_logits(model.model, batch)).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total.addcmul_(grad.float(), grad.float())
    return {name: (total / len(examples)).cpu() for name, total in sums.items()}


@torch.no_grad()
def input_gram(model: TrainableModel, examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Return X^T X of the inputs of every trained linear weight, over all tokens of the rows.

    RegMean's statistic (Jin et al. 2023, arXiv 2212.09849). A LoRA A reads the layer's input, B reads A's output;
    weights that are no linear layer's have none.

    Returns:
        float32 (in, in) per weight, by its name in the state, on the CPU.
    """
    names = {id(parameter): name for name, parameter in model.parameters().items()}
    grams: dict[str, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for weights in _chains(module):
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            for position, weight in enumerate(weights):
                if (name := names.get(id(weight))) is not None:
                    grams[name] = grams[name] + rows.T @ rows if name in grams else rows.T @ rows
                if position + 1 < len(weights):
                    rows = rows @ weight.float().T

    adapted = [module for module in model.model.modules() if isinstance(module, LoraLayer)]
    inside = {id(part) for module in adapted for part in module.modules()} - {id(module) for module in adapted}
    with ExitStack() as hooks:
        for module in model.model.modules():
            trained = any(id(weight) in names for weights in _chains(module) for weight in weights)
            if trained and id(module) not in inside:
                hooks.callback(module.register_forward_pre_hook(watch).remove)
        for example in examples:  # one at a time, so that no padding is counted
            answer_logits(model.model, _to(collate([example], pad_id), model))
    return {name: gram.cpu() for name, gram in grams.items()}


STATISTICS: Mapping[str, Callable[[TrainableModel, Sequence[Example], int], dict[str, Tensor]]] = {
    "fisher": diagonal_fisher,
    "gram": input_gram,
}
"""What clients can send, by group of ``extras``."""


NON_NEGATIVE = frozenset({"fisher"})
"""Groups in which no value is below zero."""


@dataclass(frozen=True)
class Statistics(RoundPart, name="statistics"):
    """Sends statistics of the client's rows, taken of the tuned model: one group of the update for each kind."""

    order: ClassVar[int] = 40

    groups: tuple[str, ...] = ()
    """Kinds, of :data:`STATISTICS`."""

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """Take what the aggregator needs.

        Raises:
            ConfigError: If clients cannot compute a kind.
        """
        unknown = sorted(set(rules.aggregator.needs_extras).difference(STATISTICS))
        if unknown:
            raise ConfigError(f"aggregator.name: clients send no {unknown[0]!r} statistics; choose another aggregator")
        return cls(tuple(rules.aggregator.needs_extras))

    def reply(self, task: ClientRound, update: ClientUpdate) -> ClientUpdate:
        """Add the statistics."""
        if not task.writes:
            return update
        found = client_statistics(self.groups, task.model, task.examples, pad_id=task.pad_id, device=task.device)
        return replace(update, extras={**update.extras, **found})

    def expects(self, up: Mapping[str, Group], model: TrainableModel, client_id: str = "") -> Mapping[str, Group]:
        """Add the statistics' forms."""
        added = {}
        for group in self.groups:
            shapes = _SHAPES[group](model).items()
            forms = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes}
            added[group] = Group(forms, squares=True, non_negative=group in NON_NEGATIVE)
        return {**up, **added}


def _parameter_shapes(model: TrainableModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.parameters().items()}


def _gram_shapes(model: TrainableModel) -> dict[str, tuple[int, ...]]:
    names = {id(parameter): name for name, parameter in model.parameters().items()}
    chains = (chain for module in model.model.modules() for chain in _chains(module))
    trained = {names[id(weight)]: weight.shape[1] for chain in chains for weight in chain if id(weight) in names}
    return {name: (width, width) for name, width in trained.items()}


_SHAPES: Mapping[str, Callable[[TrainableModel], dict[str, tuple[int, ...]]]] = {
    "fisher": _parameter_shapes,
    "gram": _gram_shapes,
}


def _chains(module: nn.Module) -> list[list[Tensor]]:
    """Return the linear weights (out, in) that a module applies to its input, each list one after the other."""
    if isinstance(module, LoraLayer):
        return [[module.lora_A[name].weight, module.lora_B[name].weight] for name in module.lora_A]
    return [[module.weight]] if isinstance(module, nn.Linear) else []


def _to(batch: Mapping[str, Tensor], model: TrainableModel) -> dict[str, Tensor]:
    return {name: tensor.to(model.model.device) for name, tensor in batch.items()}

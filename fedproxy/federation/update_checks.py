"""What an update must be before it is merged; a client's payload is never trusted."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.aggregators.cohort import Source


def check_update(update: ClientUpdate, broadcast: Broadcast) -> float:
    """Check one update against the round it should answer, reading one part of one tensor at a time.

    Args:
        update: What came back; its tensors may lie in a file.
        broadcast: What was asked.

    Returns:
        The update's Euclidean norm over all tensors.

    Raises:
        ClientError: If round, counts, tensors' names, shapes or dtypes are others than asked for, or a value is
            not finite.
    """
    if update.round != broadcast.round:
        raise ClientError(f"the update answers round {update.round}, not {broadcast.round}; send no earlier one again")
    _check_counts(update)
    odd = sorted(set(broadcast.state).symmetric_difference(update.delta))
    if odd:
        what = "lacks tensor" if odd[0] in broadcast.state else "has unknown tensor"
        raise ClientError(f"the update {what} {odd[0]!r}; send exactly the tensors of the broadcast state")
    squares = sum(_square(update.delta, name, broadcast.state[name]) for name in sorted(update.delta))
    for group, tensors in sorted(update.extras.items()):
        for name in sorted(tensors):
            _square(tensors, name, None, f"extras[{group!r}] ")
    return math.sqrt(squares)


def too_long(norms: Mapping[str, float], ratio: float) -> dict[str, str]:
    """Return which clients' updates are longer than ``ratio`` times the median, with the reason.

    The lower median is taken, so that of two updates the shorter one counts; a median of zero says nothing.
    """
    median = sorted(norms.values())[(len(norms) - 1) // 2] if norms else 0.0
    if median == 0.0:
        return {}
    return {
        client: f"its update's norm {norm:.3g} is {norm / median:.3g} times the round's median {median:.3g}, "
        f"federation.max_norm_ratio allows {ratio:g}"
        for client, norm in norms.items()
        if norm > ratio * median
    }


def _check_counts(update: ClientUpdate) -> None:
    for name, least in (("num_examples", 1), ("num_tokens", 0)):
        value = getattr(update, name)
        if type(value) is not int or value < least:
            raise ClientError(f"the update's {name} must be a whole number of at least {least}, got {value!r}")
    for name in ("train_loss", "regularizer_loss", "seconds"):
        value = getattr(update, name)
        if not (value is None or isinstance(value, int | float)):
            raise ClientError(f"the update's {name} must be a number, got {value!r}")


def _square(tensors: Tensors, name: str, wanted: Tensor | None, where: str = "") -> float:
    """Return a tensor's squared norm.

    Raises:
        ClientError: If its shape or dtype is not the wanted one, or a value is not finite.
    """
    source = Source.of(tensors, name)
    if wanted is not None and (source.shape != tuple(wanted.shape) or source.dtype != wanted.dtype):
        asked = f"{str(wanted.dtype).removeprefix('torch.')} {tuple(wanted.shape)}"
        raise ClientError(f"{where}tensor {name!r} must be {asked}, got {source}; send the broadcast's shape and dtype")
    # In float64 no finite float32 overflows, so that a norm that is not finite comes from a value that is not.
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in source.parts()]
    total = float(sum(norm**2 for norm in norms))
    if not math.isfinite(total):
        raise ClientError(f"{where}tensor {name!r} must be finite, got NaN or infinity")
    return total

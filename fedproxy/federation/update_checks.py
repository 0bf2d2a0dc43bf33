"""What an update must be before it is merged; a client's payload is never trusted."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedproxy.errors import ClientError
from fedproxy.federation.expected import Expected
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors
from fedproxy.strategies.aggregators.cohort import Source

_MOST_COUNTED = 10**9
"""Most examples or tokens of a client whose rows the server does not know."""
_LARGEST_LOSS = 1e9
_LONGEST_S = 1e8
"""Three years."""


def check_update(update: ClientUpdate, broadcast: Broadcast, expected: Expected) -> dict[str, float]:
    """Check one update against the round it should answer, reading one part of one tensor at a time.

    Args:
        update: What came back; its tensors may lie in a file.
        broadcast: What was asked.
        expected: What else the server knows of it.

    Returns:
        The update's Euclidean norm over all tensors, under ``""``, and that of every group of extras under its name
        (of sums of squares its square root).

    Raises:
        ClientError: If round, figures, tensors' names, shapes or dtypes are others than asked for, or a value is
            not finite.
    """
    if update.round != broadcast.round:
        raise ClientError(
            f"the update answers round {_shown(update.round)}, not {broadcast.round}; send no earlier one again"
        )
    _check_counts(update, broadcast, expected)
    _check_figure(update, "train_loss", -_LARGEST_LOSS, _LARGEST_LOSS, optional=True)
    _check_figure(update, "regularizer_loss", -_LARGEST_LOSS, _LARGEST_LOSS, optional=True)
    _check_figure(update, "seconds", 0.0, _LONGEST_S)
    delta = broadcast.state if expected.delta is None else expected.delta
    _check_names(update.delta, delta, "tensor", "tensors that the round asks for")
    _check_names(update.extras, expected.extras, "extras", "extras that the round asks for")
    norms = {"": _norm(update.delta, delta)}
    for group, form in expected.extras.items():
        sent, where = update.extras[group], f"extras[{group!r}] "
        _check_names(sent, form.tensors, f"{where}tensor", "tensors that the round asks for")
        norm = _norm(sent, form.tensors, where, non_negative=form.non_negative)
        norms[group] = math.sqrt(norm) if form.squares else norm
    return norms


def too_long(norms: Mapping[str, float], ratio: float, part: str = "") -> dict[str, str]:
    """Return which clients' updates are longer than ``ratio`` times the median, with the reason.

    The lower median is taken, so that of two updates the shorter one counts; a median of zero says nothing.

    Args:
        norms: By client, of one part of :func:`check_update`'s result.
        ratio: Largest multiple of the median.
        part: Which part, for the reason.
    """
    median = sorted(norms.values())[(len(norms) - 1) // 2] if norms else 0.0
    if median == 0.0:
        return {}
    of = f" of extras[{part!r}]" if part else ""
    return {
        client: f"its update's norm{of} {norm:.3g} is {norm / median:.3g} times the round's median {median:.3g}, "
        f"federation.max_norm_ratio allows {ratio:g}"
        for client, norm in norms.items()
        if norm > ratio * median
    }


def _check_counts(update: ClientUpdate, broadcast: Broadcast, expected: Expected) -> None:
    """Check what an update may weigh; where the server dealt the rows out it knows the numbers itself."""
    rows = None if expected.rows is None else expected.rows.get(update.client_id)
    if rows is None:
        _check_count(update, "num_examples", 1, _MOST_COUNTED)
        _check_count(update, "num_tokens", 0, _MOST_COUNTED)
        return
    _check_count(update, "num_examples", rows, rows)
    passes = rows * int(broadcast.job.get("epochs", 1))
    longest = expected.target_tokens
    _check_count(update, "num_tokens", passes, _MOST_COUNTED if longest is None else passes * longest)


def _check_count(update: ClientUpdate, name: str, least: int, most: int) -> None:
    value = getattr(update, name)
    if type(value) is not int or not least <= value <= most:
        rule = f"the {most} that it was dealt" if least == most else f"a whole number from {least} to {most}"
        raise ClientError(f"the update's {name} must be {rule}, got {_shown(value)}")


def _check_figure(update: ClientUpdate, name: str, least: float, most: float, *, optional: bool = False) -> None:
    value = getattr(update, name)
    if value is None and optional:
        return
    # Compared, not converted: a whole number too large for a float is one too large for the bounds.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ClientError(f"the update's {name} must be a number from {least:g} to {most:g}, got {_shown(value)}")


def _check_names(sent: Mapping[str, Any], asked: Mapping[str, Any], what: str, all_of_them: str) -> None:
    odd = sorted(set(asked).symmetric_difference(sent))
    if odd:
        verb = "lacks" if odd[0] in asked else "has unknown"
        raise ClientError(f"the update {verb} {what} {_shown(odd[0])}; send exactly the {all_of_them}")


def _norm(tensors: Tensors, wanted: Tensors, where: str = "", *, non_negative: bool = False) -> float:
    """Return the Euclidean norm over all tensors, whose names are checked.

    Raises:
        ClientError: If a shape or dtype is not the wanted one, or a value is not finite, or negative where none may be.
    """
    squares = 0.0
    for name in sorted(wanted):
        source = Source.of(tensors, name)
        _check_form(source, wanted[name], f"{where}tensor {name!r}")
        total = 0.0
        for part in source.parts():
            # In float64 no finite float32 overflows, so that a norm that is not finite comes from a value that is not.
            total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
            if non_negative and bool((part < 0).any()):
                raise ClientError(f"{where}tensor {name!r} must be non-negative, got {float(part.min()):g}")
        if not math.isfinite(total):
            raise ClientError(f"{where}tensor {name!r} must be finite, got NaN or infinity")
        squares += total
    return math.sqrt(squares)


def _check_form(source: Source, wanted: Tensor, what: str) -> None:
    if source.shape != tuple(wanted.shape) or source.dtype != wanted.dtype:
        asked = f"{str(wanted.dtype).removeprefix('torch.')} {tuple(wanted.shape)}"
        raise ClientError(f"{what} must be {asked}, got {source}; send the shape and dtype that the round asks for")


def _shown(value: Any) -> str:
    """Return a sent value for a message of one short line."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."

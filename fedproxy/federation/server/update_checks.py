"""What an update's figures and values must be before it is merged; its form is checked when it is admitted."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fedproxy.errors import ClientError, one_line
from fedproxy.federation.server.expected import Expected
from fedproxy.protocol import Broadcast, ClientUpdate, Tensors, is_seal
from fedproxy.strategies.aggregators.cohort import Source

_MOST_COUNTED = 10**9
"""Most examples or tokens of a client whose rows the server does not know."""
_WITHHELD = {"num_examples": 1, "num_tokens": 0, "train_loss": None, "regularizer_loss": None}
"""What an update says where its figures are not told: all count alike."""
_LARGEST_LOSS = 1e9
_LONGEST_S = 1e8
"""Three years."""
LARGEST_CHANGE = 1e4
"""Most that a round may change a coordinate: hundreds of times what AdamW does at any rate that trains a model, and so
small that sums of squares over all coordinates stay far inside float32."""
_LARGEST_EXTRA = 1e9
"""Largest magnitude in extras; of those that are squares, its square."""


def check_update(update: ClientUpdate, broadcast: Broadcast, expected: Expected) -> dict[str, float]:
    """Check one update against the round it should answer, reading one part of one tensor at a time.

    Args:
        update: What was admitted (:func:`fedproxy.federation.server.admission.admit`); its tensors may lie in a file.
        broadcast: What was asked.
        expected: What else the server knows of it.

    Returns:
        The update's Euclidean norm over all tensors, under ``""``, and that of every group of extras under its name
        (of sums of squares its square root); nothing of what is masked or holds figures.

    Raises:
        ClientError: If round or figures are others than asked for, or a value is not finite, or too large.
    """
    if type(update.round) is not int or update.round != broadcast.round:
        raise ClientError(
            f"the update answers round {_shown(update.round)}, not {broadcast.round}; send no earlier one again"
        )
    if not is_seal(update.seal):
        raise ClientError(f"the update's seal must be a SHA-256 or empty, got {_shown(update.seal)}")
    _check_counts(update, broadcast, expected)
    _check_figure(update, "train_loss", -_LARGEST_LOSS, _LARGEST_LOSS, optional=True)
    _check_figure(update, "regularizer_loss", -_LARGEST_LOSS, _LARGEST_LOSS, optional=True)
    _check_figure(update, "seconds", 0.0, _LONGEST_S)
    norms = {} if expected.masked else {"": _norm(update.delta, LARGEST_CHANGE)}
    for group, form in expected.extras.items():
        if form.masked or group not in update.extras:  # it was of the wire alone
            continue
        largest = _LARGEST_EXTRA**2 if form.squares else _LARGEST_EXTRA
        norm = _norm(update.extras[group], largest, f"extras[{group!r}] ", non_negative=form.non_negative)
        if not form.figures:
            norms[group] = math.sqrt(norm) if form.squares else norm
    return norms


def too_long(norms: Mapping[str, float], ratio: float, part: str = "") -> dict[str, str]:
    """Return which clients' updates are longer than ``ratio`` times the median, with the reason.

    The lower median of those that moved is taken, so that of two updates the shorter one counts.

    Args:
        norms: By client, of one part of :func:`check_update`'s result.
        ratio: Largest multiple of the median.
        part: Which part, for the reason.
    """
    moved = sorted(norm for norm in norms.values() if norm)
    if not moved:
        return {}
    median = moved[(len(moved) - 1) // 2]
    of = f" of extras[{part!r}]" if part else ""
    return {
        client: f"its update's norm{of} {norm:.3g} is {norm / median:.3g} times the round's median {median:.3g}, "
        f"federation.max_norm_ratio allows {ratio:g}"
        for client, norm in norms.items()
        if norm > ratio * median
    }


def _check_counts(update: ClientUpdate, broadcast: Broadcast, expected: Expected) -> None:
    """Check what an update may weigh and tell; where the server dealt the rows out it knows the numbers itself."""
    if expected.withheld:
        for name, value in _WITHHELD.items():
            said = getattr(update, name)
            if type(said) is not type(value) or said != value:
                raise ClientError(f"the update's {name} must be withheld ({value}), got {_shown(said)}")
        return
    rows = None if expected.rows is None else expected.rows.get(update.client_id)
    if rows is None:
        _check_count(update, "num_examples", 1, _MOST_COUNTED)
        _check_count(update, "num_tokens", 0, _MOST_COUNTED)
        return
    _check_count(update, "num_examples", rows, rows)
    least = most = rows * int(broadcast.job.get("epochs", 1))
    steps, longest = broadcast.job.get("max_steps"), expected.target_tokens
    if steps is not None:  # a step has a row at least
        least = min(least, steps)
        most = min(most, steps * broadcast.job["batch_size"] * broadcast.job["accumulate"])
    _check_count(update, "num_tokens", least, _MOST_COUNTED if longest is None else most * longest)


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


def _norm(tensors: Tensors, largest: float, where: str = "", *, non_negative: bool = False) -> float:
    """Return the Euclidean norm over all tensors.

    Raises:
        ClientError: If a value is not finite, or of a larger magnitude, or negative where none may be.
    """
    squares = 0.0
    for name in sorted(tensors):
        what = f"{where}tensor {name!r}"
        for part in Source.of(tensors, name).parts():
            low, high = (float(bound) for bound in part.aminmax()) if len(part) else (0.0, 0.0)
            most = max(-low, high)
            if not math.isfinite(most):  # both bounds are NaN where a value is
                raise ClientError(f"{what} must be finite, got NaN or infinity; lower client.lr")
            if most > largest:
                raise ClientError(f"{what} must lie within {largest:g}, got a magnitude of {most:.3g}; lower client.lr")
            if non_negative and low < 0:
                raise ClientError(f"{what} must be non-negative, got {low:g}")
            squares += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return math.sqrt(squares)


def _shown(value: Any) -> str:
    """Return a sent value for a message of one short line."""
    try:
        return one_line(repr(value), 60)
    except Exception:  # a whole number of more digits than Python writes, or a foreign object
        return f"a {type(value).__name__}"

"""A clip that follows a private quantile of the updates' norms (Andrew et al. 2021, arXiv 1905.03871)."""

import math

_RATE = 0.2
"""Step of the clip's logarithm per round (eta_C of the paper)."""
_LONGER = 1.05
"""How much longer the noise on the update is than without the count, which needs its share of the budget."""


def split_noise(noise_multiplier: float) -> tuple[float, float]:
    """Return the noise of an update and of its count that together reveal what ``noise_multiplier`` alone would.

    A client tells whether its update was within the clip as +1/2 or -1/2, and a client that is missing as 0. Gaussian
    noise of multiplier z_u on the update and of standard deviation s on the count reveal as much as one Gaussian with
    1 / z^2 = 1 / z_u^2 + 1 / (2 s)^2 (Theorem 1 of the paper). Choice: z_u = 1.05 z, so that s = 1.64 z.

    Args:
        noise_multiplier: z, at least 0, in units of the clip.

    Returns:
        z_u, in units of the clip, and s, in counts.
    """
    return _LONGER * noise_multiplier, noise_multiplier / (2 * math.sqrt(1 - _LONGER**-2))


def next_clip(clip: float, within: float, quantile: float) -> float:
    """Return the clip of the next round: C exp(-0.2 (b - q)), where b is the share of updates within C.

    Args:
        clip: This round's clip C, > 0.
        within: b as it was told under noise; it is cut to [0, 1].
        quantile: Share q of updates that the clip should leave whole, in (0, 1).
    """
    return clip * math.exp(-_RATE * (min(1.0, max(0.0, within)) - quantile))

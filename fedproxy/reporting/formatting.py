"""Numbers as a person reads them."""

from collections.abc import Sequence

from fedproxy.metric_facts import facts
from fedproxy.reporting.scores import Value
from fedproxy.reporting.statistics import Interval

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def count(value: float | None) -> str:
    """Return a count with a decimal unit: 134515008 -> ``134.5 M``."""
    return _scaled(value, 1000.0, ("", " k", " M", " B", " T"))


def size(value: float | None) -> str:
    """Return bytes with a binary unit: 1536 -> ``1.5 KiB``."""
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float | None, step: float, units: Sequence[str]) -> str:
    if value is None:
        return NONE
    power = 0
    while power < len(units) - 1 and round(abs(value), 1) >= step:
        value, power = value / step, power + 1
    return f"{value:.0f}{units[0]}" if power == 0 else f"{value:.1f}{units[power]}"


def duration(seconds: float | None) -> str:
    """Return seconds as ``8.4 s``, ``12 min 05 s`` or ``3 h 07 min``."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage: 0.385 -> ``38.5 %``."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def score(value: Value | None) -> str:
    """Return a score in per cent with its standard error: ``38.5 ± 2.0``."""
    if value is None:
        return NONE
    return f"{100 * value.value:.1f}" + ("" if value.stderr is None else f" ± {100 * value.stderr:.1f}")


def change(value: Value | None, with_stderr: bool = False) -> str:
    """Return a difference of scores in points with its sign: ``+9.2``, on request with its standard error."""
    if value is None:
        return NONE
    error = f" ± {100 * value.stderr:.1f}" if with_stderr and value.stderr is not None else ""
    return points(value.value) + error


def points(fraction: float) -> str:
    """Return a difference of fractions in points with its sign: 0.092 -> ``+9.2``."""
    return signed(100 * fraction, 1)


def interval(low: float, high: float) -> str:
    """Return an interval of fractions in points: ``+6.2 to +12.0``."""
    return f"{points(low)} to {points(high)}"


def with_interval(found: Interval) -> str:
    """Return an estimate that is no fraction with its interval: ``+0.58 (+0.44 to +0.73)``."""
    return f"{signed(found.estimate)} ({signed(found.low)} to {signed(found.high)})"


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign, a true minus for negative ones; what rounds to zero has none."""
    text = f"{abs(value):.{digits}f}"
    if not text.strip("0."):
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def measured(metric: str, value: Value | None) -> str:
    """Return a value of ``metric`` with its standard error: shares in per cent, others as plain numbers."""
    if value is None or facts(metric).share:
        return score(value)
    return fixed(value.value) + ("" if value.stderr is None else f" ± {fixed(value.stderr)}")


def measured_change(metric: str, value: Value | None, with_stderr: bool = False) -> str:
    """Return a difference of two values of ``metric`` with its sign: shares in points, others as plain numbers."""
    if value is None or facts(metric).share:
        return change(value, with_stderr)
    error = f" ± {fixed(value.stderr)}" if with_stderr and value.stderr is not None else ""
    return signed(value.value, 3) + error


def measured_interval(metric: str, low: float, high: float) -> str:
    """Return an interval of differences of ``metric``."""
    return interval(low, high) if facts(metric).share else f"{signed(low, 3)} to {signed(high, 3)}"


def unit(metric: str) -> str:
    """Return in words what values of ``metric`` are counted in, and if lower is better; "" where there is no word."""
    counted = "in per cent" if facts(metric).share else "in nats per token" if metric == "answer_nll" else ""
    return counted if facts(metric).higher_is_better else f"{counted}, lower is better".removeprefix(", ")


def p_value(value: float) -> str:
    """Return a p-value: ``0.034``, ``< 0.001``."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a plain number with ``digits`` significant digits, tiny ones in exponent form."""
    return NONE if value is None else f"{MINUS if value < 0 else ''}{abs(value):.{digits}g}"


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a plain number with ``digits`` decimals."""
    return NONE if value is None else signed(value, digits).removeprefix("+")

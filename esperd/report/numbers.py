"""Numbers as people read them. What is unknown is written ``–``, never 0."""

from __future__ import annotations

import math

from esperd.messages.jobs import DEFAULT_METRICS

SHARES = frozenset(DEFAULT_METRICS.values())
"""Metrics that are shares, of samples or of tokens: written in percent, their differences in points. Of the user's own metrics
nobody knows."""
UNKNOWN = "–"  # noqa: RUF001 - a dash, as tables write it
_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """A whole number with thousands separated: ``12,345``."""
    return UNKNOWN if value is None else f"{round(value):,}"


def scaled(value: float | None, unit: str = "") -> str:
    """Three significant digits and a prefix: ``1.23 MFLOP``."""
    if value is None:
        return UNKNOWN
    for size, prefix in _STEPS:
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)} {prefix}{unit}"
    shown = f"{value:.0f}" if value == round(value) else _three_digits(value)
    return f"{shown} {unit}".rstrip()


def flops(value: float | None) -> str:
    """FLOPs with a prefix: ``1.23 MFLOP``."""
    return scaled(value, "FLOP")


def size(value: int | None) -> str:
    """Bytes with a decimal prefix: ``2.1 kB``."""
    return scaled(value, "B")


def loss(value: float | None) -> str:
    """A loss, to four places."""
    return UNKNOWN if value is None else f"{value:.4f}"


def signed(value: float | None, places: int = 4) -> str:
    """A difference, with its sign."""
    return UNKNOWN if value is None else f"{round(value, places) + 0.0:+.{places}f}"  # + 0.0: no minus before a zero


def metric(value: float | None, name: str | None) -> str:
    """A metric: a share as a percentage, any other as it is."""
    if value is None:
        return UNKNOWN
    return f"{value * 100:.2f} %" if name in SHARES else f"{value:.4f}"


def interval(mean: float | None, lower: float | None, upper: float | None, places: int = 4) -> str:
    """A mean with its interval: ``+0.0123 [+0.0101, +0.0145]``."""
    if mean is None:
        return UNKNOWN
    if lower is None or upper is None:
        return signed(mean, places)
    return f"{signed(mean, places)} [{signed(lower, places)}, {signed(upper, places)}]"


def change(value: float | None, before: float | None) -> str:
    """Relative change in percent, with its sign; ``–`` when there was nothing before."""
    return UNKNOWN if value is None or not before else f"{(value - before) / before * 100:+.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as ``850 ms``, ``12.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _three_digits(value: float) -> str:
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(2, max(0, 2 - magnitude))}f}"

"""Numbers as people read them: the one place that turns a value and its unit into text."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"
_THIN_SPACE, _NO_BREAK, _MINUS = "\u202f", "\u00a0", "\u2212"


def format_value(value: float | None, unit: str = "") -> str:
    """Text of `value` with its unit: bytes as MB (10^6), a fraction as per cent, anything else with four figures.

    None reads "not measured".
    """
    if value is None:
        return NOT_MEASURED
    if math.isnan(value):
        return "not a number"
    factor, shown = _scale(value, unit)
    return _with_unit(_number(value * factor, _decimals(value * factor)), shown)


def format_limit(value: float, unit: str) -> str:
    """Text of a number that a person stated, without figures that were not stated: "1.1", "5 %", "72 MB"."""
    factor, shown = _scale(value, unit)
    text = f"{value * factor:.6g}"
    return format_value(value, unit) if "e" in text else _with_unit(text.replace("-", _MINUS), shown)


def format_measured(value: float, low: float, high: float, unit: str) -> tuple[str, str]:
    """Texts of a value and of its interval, in one unit and with as many digits as the interval's width deserves.

    The interval reads "20.61 to 21.83"; "single value" when it has no width; "no interval" when an end is not finite.
    """
    if not all(map(math.isfinite, (value, low, high))):
        return format_value(value, unit), "no interval"
    if low == high:
        return format_value(value, unit), "single value"
    factor, shown = _scale(value, unit)
    half_width = abs(high - low) / 2 * factor
    digits = min(6, max(0, 1 - math.floor(math.log10(half_width))))
    ends = f"{_number(low * factor, digits)} to {_number(high * factor, digits)}"
    return _with_unit(_number(value * factor, digits), shown), _with_unit(ends, shown)


def format_seconds(seconds: float | None) -> str:
    """Text of a duration: "45 s", "6 min 12 s", "1 h 04 min"."""
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    if seconds < 99.5:
        return f"{seconds:.1f}{_NO_BREAK}s" if seconds < 10 else f"{seconds:.0f}{_NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_NO_BREAK}min {rest:02d}{_NO_BREAK}s"
    return f"{minutes // 60}{_NO_BREAK}h {minutes % 60:02d}{_NO_BREAK}min"


def short_id(identifier: str) -> str:
    """The first twelve characters of a content id."""
    return identifier[:12]


def _scale(value: float, unit: str) -> tuple[float, str]:
    """What to multiply a value by before it is shown, and the unit's text then."""
    if unit == "bytes":
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if math.isfinite(value) and abs(value) >= size:
                return 1 / size, name
        return 1.0, "bytes"
    if unit == "fraction":
        return 100.0, "%"
    return 1.0, "" if unit in ("ratio", "count", "cosine") else unit


def _number(shown: float, digits: int) -> str:
    if math.isinf(shown):
        return f"{_MINUS if shown < 0 else ''}infinity"
    text = f"{shown:,.{digits}f}".replace(",", _THIN_SPACE)
    if text.startswith("-"):
        return text[1:] if not text.strip(f"-0.{_THIN_SPACE}") else _MINUS + text[1:]
    return text


def _with_unit(number: str, shown: str) -> str:
    return f"{number}{_NO_BREAK}{shown}" if shown else number


def _decimals(shown: float) -> int:
    size = abs(shown)
    if not math.isfinite(size) or (size == int(size) and size < 1e6):
        return 0
    return min(6, max(0, 3 - math.floor(math.log10(size))))

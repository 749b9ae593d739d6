"""Figures as text. Unknown (None, or not finite) is `N/A`, never 0; bytes are binary (KiB = 1024 bytes)."""

import math

NOT_AVAILABLE = "N/A"

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def finite(value: float | None) -> float | None:
    """`value`, or None when it is None, NaN or infinite: records hold numbers or null."""
    return None if value is None or not math.isfinite(value) else value


def format_bytes(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `512 B`, `1.5 KiB`, `3.20 GiB`."""
    if (known := finite(count)) is None:
        return NOT_AVAILABLE
    unit = 0
    # 1023.95 KiB would print as 1024.0 KiB: the next unit starts where rounding reaches it.
    while abs(known) >= (1024 if unit == 0 else 1023.95) and unit < len(_BYTE_UNITS) - 1:
        known /= 1024
        unit += 1
    if unit == 0:
        return f"{known:.0f} B"
    return f"{known:.{2 if unit >= 3 else 1}f} {_BYTE_UNITS[unit]}"


def format_seconds(seconds: float | None) -> str:
    """Seconds with three digits that mean something: `0.42 ms`, `37.2 ms`, `412 ms`, `1.24 s`, `83.0 s`."""
    if (known := finite(seconds)) is None:
        return NOT_AVAILABLE
    if abs(known) < 0.9995:
        return f"{_three_digits(known * 1000)} ms"
    return f"{_three_digits(known)} s"


def format_rate(per_second: float | None, unit: str = "tokens/s") -> str:
    """A rate with its unit: `12.3 tokens/s`."""
    if (known := finite(per_second)) is None:
        return NOT_AVAILABLE
    return f"{_three_digits(known)} {unit}"


def format_ratio(ratio: float | None) -> str:
    """A ratio of two named arms: `1.23x`."""
    if (known := finite(ratio)) is None:
        return NOT_AVAILABLE
    return f"{known:.2f}x"


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.123 is `12.3 %`."""
    if (known := finite(fraction)) is None:
        return NOT_AVAILABLE
    return f"{known * 100:.{digits}f} %"


def format_number(value: float | None, digits: int = 2) -> str:
    """A plain number with `digits` decimals: `0.25`."""
    if (known := finite(value)) is None:
        return NOT_AVAILABLE
    text = f"{known:.{digits}f}"
    # A tiny negative number is shown as zero, not as minus zero.
    return text if float(text) else text.removeprefix("-")


def format_count(count: int | None) -> str:
    """A whole number with thousands separated: `7,290`."""
    return NOT_AVAILABLE if count is None else f"{count:,}"


def _three_digits(value: float) -> str:
    size = abs(value)
    # The limits are where rounding to fewer decimals takes over: 9.996 is 10.0, not 10.00.
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"

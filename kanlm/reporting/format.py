"""Numbers and settings as people read them: digits, units, and a dash for what is missing."""

import json
from collections.abc import Sequence
from typing import Any

from kanlm.results.sweep import is_number

MISSING = "–"

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, digits: int = 3) -> str:
    """Format with so many decimals: 2.104."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference with its sign: +0.120, −0.034, and 0.000 without one."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """Format with so many significant digits and no exponent: 8.31, 83.1, 8,310."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - len(str(int(abs(rounded))))) if abs(rounded) >= 1 else digits
    return f"{rounded:,.{decimals}f}".replace("-", "−")


def count(value: float | None, unit: str = "") -> str:
    """Format with a decimal prefix: 1.06 M, 512 k; below a thousand as it is."""
    if value is None:
        return MISSING
    for size, prefix in _PREFIXES:
        # 999,950 is already 1.00 M at three digits.
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)} {prefix}{unit}"
    return f"{significant(value) if value % 1 else int(value)} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Format seconds: 1.21 ms, 45.2 s, 3.33 min, 2.08 h."""
    if seconds is None:
        return MISSING
    if 0 < seconds < 0.1:
        return f"{significant(1e3 * seconds)} ms"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{significant(seconds / size)} {unit}"
    return f"{significant(seconds)} s"


def span(ends: Sequence[float | None] | None, digits: int = 3) -> str:
    """Format an interval or a range: 2.081–2.131, or −0.070 to 0.030 where signs would clash."""
    if ends is None or None in ends:
        return MISSING
    low, high = (fixed(end, digits) for end in ends)
    return f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def short_names(settings: Sequence[str]) -> dict[str, str]:
    """Map each dotted setting to its last part, where that names no other."""
    last = [name.rpartition(".")[2] for name in settings]
    return {
        name: short if last.count(short) == 1 else name
        for name, short in zip(settings, last, strict=True)
    }


def setting_value(value: Any) -> str:
    """Format a setting's value as a user would write it."""
    if is_number(value):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return value if isinstance(value, str) else json.dumps(value)

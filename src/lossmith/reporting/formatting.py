"""Numbers as people read them: two significant digits of the spread, SI prefixes, minutes, mebibytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

NONE = "-"


def number(value: float, spread: float = math.nan, *, sign: bool = False) -> str:
    """``value`` with as many decimals as its ``spread`` (two significant digits of it) deserves.

    >>> number(3.14159265, 0.0123), number(3.14159265), number(0.5, sign=True), number(float("nan"))
    ('3.142', '3.142', '+0.5', '-')
    """
    if math.isnan(value):
        return NONE
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    plus = "+" if sign and value != 0 else ""
    fits = abs(value) < 1e7 and 1e-7 < spread < 1e7
    if value != 0 and not 1e-4 <= abs(value) < 1e7 and not fits:
        return f"{value:{plus}.3g}"
    if math.isfinite(spread) and spread > 0:
        decimals = min(8, max(0, 1 - math.floor(math.log10(spread))))
        # Rounded to zero a value would lose its sign, and with it the side of zero that it is on.
        return f"{value:{plus}.{decimals}f}" if value == 0 or round(value, decimals) else f"{value:{plus}.1g}"
    return f"{value:{plus}.4g}" if abs(value) < 1e4 else f"{value:{plus}.7g}"


def interval_text(low: float, high: float) -> str:
    """``[low, high]`` with the decimals that its width deserves, or a dash.

    >>> interval_text(-0.0312345, 0.0123456)
    '[-0.031, +0.012]'
    """
    if math.isnan(low) or math.isnan(high):
        return NONE
    half = (high - low) / 2 if math.isfinite(high - low) else math.nan
    return f"[{number(low, half, sign=True)}, {number(high, half, sign=True)}]"


def p_text(p: float) -> str:
    """A p-value with two digits, or as below a thousandth.

    >>> p_text(0.04321), p_text(1e-9), p_text(1.0)
    ('0.043', '<0.001', '1')
    """
    if math.isnan(p):
        return NONE
    if p < 0.001:
        return "<0.001"
    return "1" if p > 0.995 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def count(value: float, unit: str = "") -> str:
    """A count with an SI prefix from ten thousand on.

    >>> count(950), count(1_048_576), count(3.2e15, "FLOP"), count(0)
    ('950', '1.05M', '3.20 PFLOP', '-')
    """
    if value == 0 or not math.isfinite(value):
        return NONE if not math.isinf(value) else "infinite"
    gap = " " if unit else ""
    if abs(value) < 9_999.5:
        return f"{value:,.0f}{gap}{unit}"
    prefixes = ["k", "M", "G" if unit else "B", "T", "P", "E", "Z", "Y"]
    power = min(int(math.log10(abs(value)) // 3), len(prefixes))
    scaled = value / 1000**power
    if abs(scaled) >= 999.5 and power < len(prefixes):
        power, scaled = power + 1, scaled / 1000
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f}{gap}{prefixes[power - 1]}{unit}"


def seconds(value: float) -> str:
    """A duration.

    >>> seconds(0.0123), seconds(75), seconds(7200), seconds(0)
    ('0.012 s', '1.2 min', '2.0 h', '-')
    """
    if value == 0 or not math.isfinite(value):
        return NONE
    if value < 60:
        return f"{value:.3f} s" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"


def memory(value: float) -> str:
    """Bytes in binary units.

    >>> memory(512 * 2**20), memory(1.5 * 2**30), memory(0)
    ('512 MiB', '1.50 GiB', '-')
    """
    if value == 0 or not math.isfinite(value):
        return NONE
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        scaled = value / 1024**power
        if scaled >= 1:
            return f"{scaled:.2f} {unit}" if scaled < 10 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"


def relative(value: float) -> str:
    """A relative difference in percent; from tenfold on as a factor.

    >>> relative(0.0213), relative(-0.5), relative(24.0), relative(float("inf"))
    ('+2.1%', '-50%', '25x', 'only here')
    """
    if math.isinf(value):
        return "only here"
    if value >= 9:
        return f"{1 + value:.3g}x"
    return f"{100 * value:+.0f}%" if abs(value) >= 0.0995 else f"{100 * value:+.1f}%"


def plural(n: int, noun: str) -> str:
    """``n`` and the noun.

    >>> plural(1, "seed"), plural(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def one_line(text: str, width: int | None = None) -> str:
    """``text`` on one line without control characters, cut with an ellipsis beyond ``width``.

    >>> one_line("a\\nlong  name", 8)
    'a long …'
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return text if width is None or len(text) <= width else text[: max(width - 1, 1)] + "…"


def outline(value: object, indent: int = 0) -> str:
    """Nested mappings and lists in the manner of YAML, for reading only.

    >>> print(outline({"model": "tiny", "arms": ["a", "b"], "optimiser": {"lr": 0.001}}))
    model: tiny
    arms:
      - a
      - b
    optimiser:
      lr: 0.001
    """
    pad = "  " * indent
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            if _nested(item):
                lines += [f"{pad}{_scalar(key)}:", outline(item, indent + 1)]
            else:
                lines.append(f"{pad}{_scalar(key)}: {_scalar(item)}")
    elif _nested(value):
        assert isinstance(value, Sequence)
        for item in value:
            if _nested(item):
                lines.append(f"{pad}-\n{outline(item, indent + 1)}")
            else:
                lines.append(f"{pad}- {_scalar(item)}")
    else:
        lines.append(f"{pad}{_scalar(value)}")
    return "\n".join(lines)


def _nested(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and len(value) > 0


def _scalar(value: object) -> str:
    if isinstance(value, str):
        plain = bool(value) and value == one_line(value) and not value.startswith(("-", "{", "[", '"', "'", "#"))
        return value if plain and ": " not in value else json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{}"
    return "[]" if isinstance(value, (list, tuple)) else str(value)

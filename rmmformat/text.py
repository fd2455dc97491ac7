"""Names are data: how they may be shown."""

from __future__ import annotations

__all__ = ["percent", "printable", "size"]


def printable(text: str) -> str:
    r"""Text without characters that act on a terminal or a page instead of being shown.

    Controls, escapes and marks of writing direction come as ``\u202e``.
    """
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def size(n_bytes: int) -> str:
    """Bytes as people read them (powers of 1,000)."""
    amount, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{n_bytes} B" if unit == "B" else f"{amount:.2f} {unit}"


def percent(fraction: float | None) -> str:
    """A fraction as per cent, with the digits that small errors need; "-" for None."""
    if fraction is None:
        return "-"
    value = 100 * fraction
    return "0 %" if value == 0 else f"{value:.2f} %" if value >= 0.01 else f"{value:.1e} %"

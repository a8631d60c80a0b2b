"""Sizes as people write and read them. Pure."""

from __future__ import annotations

import re
from typing import Final

SIZE_PATTERN: Final = r"^\d{1,15}(\.\d{1,6})? ?([KMGTkmgt]i?[Bb]?|[Bb])?$"
"""`500GB`, `1.5 TiB`, `1048576`; `GB` is 10^9 and `GiB` 2^30, as disks and memory are sold."""
SIZE_OR_SHARE_PATTERN: Final = (
    r"^(\d{1,15}(\.\d{1,6})? ?([KMGTkmgt]i?[Bb]?|[Bb])?|(100|\d{1,2})(\.\d{1,3})?%)$"
)
"""A size, or a share of a whole such as `80%`."""

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError for what is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"`{text}` is not a size such as 500GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2]]) if "." in match[1] else (
        int(match[1]) * base ** _POWERS[match[2]]
    )  # fmt: skip


def parse_size_or_share(text: str, whole: int) -> int:
    """Bytes; `whole`: what a share is of. Raises ValueError."""
    if text.endswith("%"):
        return int(whole * float(text[:-1]) / 100)
    return parse_size(text)


def two_digits(count: float) -> int:
    """`count`, not below 0, rounded to two significant digits: 4,917 is 4,900."""
    step: int = 10 ** max(0, len(str(int(count))) - 2)
    return round(count / step) * step


def format_size(count: float) -> str:
    """`4.8 GB`: three digits at most, decimal units, as disks and networks are measured."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 99.95 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")

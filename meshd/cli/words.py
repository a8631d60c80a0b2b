"""Values of flags that are neither numbers nor names: click calls these with what was typed."""

from __future__ import annotations

import re

import click

from meshd.config import is_address

MAX_HOSTS = 4096
"""Of one model."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def length_of_time(text: str) -> float:
    """`90s`, `30m`, `24h` or `7d` in seconds. Raises click.BadParameter."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a length of time; write 30m, 24h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])


def count_of_hosts(text: str) -> int | str:
    """`1` to `4096`, or `auto`. Raises click.BadParameter."""
    word = text.strip().lower()
    if word == "auto":
        return word
    if re.fullmatch(r"\d{1,4}", word) is None or not 1 <= int(word) <= MAX_HOSTS:
        raise click.BadParameter(f"{text!r} is neither a number from 1 to {MAX_HOSTS} nor auto")
    return int(word)


def peer_address(text: str) -> str:
    """HOST:PORT, IPv6 in brackets. Raises click.BadParameter."""
    if not is_address(text):
        raise click.BadParameter(f"{text!r} is not HOST:PORT (the peer port, mostly 9338)")
    return text

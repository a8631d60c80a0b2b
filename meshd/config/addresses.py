"""Addresses and invite tokens, as far as configuration has to tell them apart. Pure."""

from __future__ import annotations

import re
from typing import Any, Final

ADDRESS_PATTERN: Final = r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):\d{1,5}"


def split_address(address: str) -> tuple[str, int]:
    """`127.0.0.1:9337` or `[::1]:9337` as (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_address(text: str) -> bool:
    """Whether `text` is HOST:PORT of somebody who can be dialled; IPv6 in brackets."""
    return bool(re.fullmatch(ADDRESS_PATTERN, text)) and 0 < split_address(text)[1] <= 65_535


def is_invite(text: str) -> bool:
    """Whether `text` claims to be an invite token, whatever it is worth."""
    return re.match(r"meshd\d{1,6}-", text.strip().lower()) is not None


def masked(value: Any) -> Any:
    """`value`, or what is in it, with every invite token replaced by `(invite)`."""
    if isinstance(value, str):
        return "(invite)" if is_invite(value) else value
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return value


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")

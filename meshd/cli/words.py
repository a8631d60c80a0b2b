"""Values of flags that are neither numbers nor names."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType):
    """`90s`, `30m`, `24h` or `7d`, as seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d{1,9})([smhd])", value.strip())
        if match is None:
            self.fail(f"{value!r} is not a length of time; write 30m, 24h or 7d", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


class PeerAddress(click.ParamType):
    """HOST:PORT, IPv6 in brackets."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from meshd.config import is_address

        if not is_address(value):
            self.fail(f"{value!r} is not HOST:PORT (the peer port, mostly 9338)", param, ctx)
        return str(value)


DURATION = Duration()
PEER_ADDRESS = PeerAddress()

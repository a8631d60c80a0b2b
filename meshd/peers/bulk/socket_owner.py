"""Whose a connection on this machine is, from the kernel's table of connections (Linux). Pure."""

from __future__ import annotations

import ipaddress
import sys
from typing import Final, TypeAlias

Endpoint: TypeAlias = tuple[str, int]
"""An IPv4 address and a port."""

_LOCAL, _REMOTE, _STATE, _UID = 1, 2, 3, 7
"""Columns of `/proc/net/tcp` and `/proc/net/tcp6`."""
_ESTABLISHED: Final = "01"
"""Only of such a socket the user is told: one that its process has closed is shown as root's."""


def owner_of(table: str, own: Endpoint, other: Endpoint) -> int | None:
    """The user of the process that has the socket at `own`, connected to `other`; None if `table`
    shows no such connection.

    `table`: `/proc/net/tcp` and `/proc/net/tcp6`, one after the other. In the latter are IPv4
    connections of IPv6 sockets.
    """
    wanted = {(_shown(own, v6=v6), _shown(other, v6=v6)) for v6 in (False, True)}
    for line in table.splitlines():
        columns = line.split()
        if len(columns) <= _UID or columns[_STATE] != _ESTABLISHED:
            continue
        if (columns[_LOCAL], columns[_REMOTE]) in wanted and columns[_UID].isdecimal():
            return int(columns[_UID])
    return None


def _shown(endpoint: Endpoint, *, v6: bool) -> str:
    """As the kernel prints it: words of 32 bits in the order of the machine, then the port."""
    address, port = ipaddress.IPv4Address(endpoint[0]).packed, endpoint[1]
    if v6:
        address = bytes(10) + b"\xff\xff" + address
    words = (address[i : i + 4] for i in range(0, len(address), 4))
    return "".join(f"{int.from_bytes(w, sys.byteorder):08X}" for w in words) + f":{port:04X}"

"""Whose a connection on this machine is, from the kernel's table of connections (Linux). Pure."""

from __future__ import annotations

from typing import TypeAlias

from meshd.kernel.tcp_table import ESTABLISHED, parse_table, written

Endpoint: TypeAlias = tuple[str, int]
"""An IPv4 address and a port."""


def owner_of(table: str, own: Endpoint, other: Endpoint) -> int | None:
    """The user of the process that has the socket at `own`, connected to `other`; None if `table`
    shows no such connection.

    Only of an established socket the user is told: one that its process has closed is shown as
    root's. `table`: `/proc/net/tcp` and `/proc/net/tcp6`, one after the other.
    """
    wanted = {
        ((local, own[1]), (remote, other[1]))
        for local, remote in zip(written(own[0]), written(other[0]), strict=True)
    }
    for found in parse_table(table):
        if found.state == ESTABLISHED and (found.local, found.remote) in wanted:
            return found.uid
    return None

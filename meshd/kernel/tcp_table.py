"""The kernel's tables of TCP sockets, read. Pure.

Source: proc_pid_net(5), `/proc/net/tcp` and `/proc/net/tcp6`; IPv4 connections of IPv6 sockets are
in the latter. Addresses are compared as the kernel writes them.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ESTABLISHED: Final = 0x01
SYN_SENT: Final = 0x02
CLOSE_WAIT: Final = 0x08
LISTEN: Final = 0x0A
"""States of TCP, as the kernel numbers them."""


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """One line of a table."""

    local: tuple[str, int]
    """Address, as the kernel writes it, and port."""
    remote: tuple[str, int]
    state: int
    uid: int
    inode: int
    """0 if no process holds it any more; `uid` says nothing then."""


def parse_table(text: str) -> Iterator[TcpSocket]:
    """The sockets of one table, or of several one after the other; lines that make no sense, as
    their heads, are passed over."""
    for line in text.splitlines():
        fields = line.split()
        try:
            yield TcpSocket(
                local=_address(fields[1]),
                remote=_address(fields[2]),
                state=int(fields[3], 16),
                uid=int(fields[7]),
                inode=int(fields[9]),
            )
        except (ValueError, IndexError):
            continue


def written(address: str) -> tuple[str, str]:
    """An IPv4 address as the kernel writes it, in words of the machine's order (`0100007F` for
    127.0.0.1 on most): of a socket of IPv4, and of one of IPv6."""
    packed = ipaddress.IPv4Address(address).packed
    return _words(packed), _words(bytes(10) + b"\xff\xff" + packed)


def _address(field: str) -> tuple[str, int]:
    address, _, port = field.partition(":")
    return address, int(port, 16)


def _words(packed: bytes) -> str:
    words = (packed[i : i + 4] for i in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)

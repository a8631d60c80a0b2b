"""Who listens on a loopback port, and who is connected to it, as the kernel tells it.

Source: proc_pid_net(5), /proc/net/tcp and tcp6, and the `socket:[inode]` links of /proc/PID/fd. The
tables are of this process's own network namespace, which is that of its children. All functions
block, usually for less than a millisecond.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path

from meshd.kernel.tcp_table import (
    CLOSE_WAIT,
    ESTABLISHED,
    LISTEN,
    SYN_SENT,
    TcpSocket,
    parse_table,
    written,
)

LOOPBACK = "127.0.0.1"
PROC = Path("/proc")

_CONNECTED = frozenset({ESTABLISHED, SYN_SENT, CLOSE_WAIT})
_LOOPBACKS = frozenset(written(LOOPBACK))
"""A program may reach it through a socket of IPv6."""
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def free_port() -> int:
    """A port of the loopback address that nobody listened on a moment ago. Whoever is to listen on
    it may come too late; ask `listens` who did."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def listens(pid: int, port: int, proc: Path = PROC) -> bool | None:
    """Whether process `pid` itself listens on `port` of the loopback address; None if this platform
    does not tell, or not this process."""
    sockets = _tables(proc)
    if sockets is None:
        return None
    inodes = {
        s.inode
        for s in sockets
        if s.state == LISTEN and s.local[1] == port and s.local[0] in _LOOPBACKS
    }
    if not inodes:
        return False
    try:
        return bool(inodes & _socket_inodes(pid, proc))
    except ProcessLookupError:
        return False
    except OSError:
        return None


def users_connected(port: int, proc: Path = PROC) -> frozenset[int]:
    """Whose processes, by user, hold connections to `port` of the loopback address, accepted or
    not. Empty where the platform does not tell."""
    return frozenset(
        s.uid
        for s in _tables(proc) or ()
        if s.remote[1] == port and s.remote[0] in _LOOPBACKS
        and s.inode and s.state in _CONNECTED
    )  # fmt: skip


def _tables(proc: Path) -> list[TcpSocket] | None:
    found: list[TcpSocket] | None = None
    for name in ("tcp", "tcp6"):
        try:
            text = (proc / "net" / name).read_text()
        except OSError:
            continue  # no /proc, or a kernel without IPv6
        found = [*(found or ()), *parse_table(text)]
    return found


def _socket_inodes(pid: int, proc: Path) -> set[int]:
    """Raises ProcessLookupError if there is no such process, another OSError if it may not be
    looked into."""
    inodes = set()
    try:
        entries = list((proc / str(pid) / "fd").iterdir())
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    for entry in entries:
        try:
            match = _SOCKET.fullmatch(str(entry.readlink()))
        except FileNotFoundError:
            continue  # closed meanwhile
        if match is not None:
            inodes.add(int(match[1]))
    return inodes

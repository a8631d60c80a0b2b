"""The listening sockets, opened before anything else; and who holds a port that is taken."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from pathlib import Path

from meshd.errors import AddressInUse, BadConfig

BACKLOG = 1024
TCP_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`; with port 0 they share one free port.

    Connections are accepted by the kernel from here on. Raises AddressInUse naming the holder if
    it can be told, BadConfig if the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BadConfig(f"`listen` {host}:{port}: {error.strerror}", param="listen") from None
    opened: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            at = (address[0], port, *address[2:])
            try:
                opened.append(_listen(family, kind, protocol, at))
            except OSError as error:
                if opened and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # localhost often has ::1 in its name but not on its interface
                raise _explain(error, host, port) from None
            port = opened[-1].getsockname()[1]
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _listen(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _explain(error: OSError, host: str, port: int) -> AddressInUse | BadConfig:
    if error.errno == errno.EADDRINUSE:
        holder = find_holder(port)
        by = f" by {holder}" if holder else ""
        return AddressInUse(
            f"{host}:{port} is taken{by}; stop that, or choose another address with --listen"
        )
    hint = "; ports below 1024 need privileges" if error.errno == errno.EACCES else ""
    return BadConfig(f"`listen` {host}:{port}: {error.strerror}{hint}", param="listen")


def find_holder(port: int, proc: Path = Path("/proc")) -> str | None:
    """`name (pid N)` of a process that listens on `port`; None where that cannot be seen."""
    inodes = set(_listening_inodes(port, (proc / "net/tcp", proc / "net/tcp6")))
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    try:
        processes = [p for p in proc.iterdir() if p.name.isdigit()]
    except OSError:
        return None
    for process in processes:
        try:
            if any(str(fd.readlink()) in wanted for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                return f"{name} (pid {process.name})"
        except OSError:
            continue  # gone, or another user's
    return None


def _listening_inodes(port: int, tables: Iterable[Path]) -> Iterable[str]:
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]

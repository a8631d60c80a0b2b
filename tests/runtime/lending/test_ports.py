"""Who listens on a port, who is connected to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.runtime.lending import ports

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout"
LINE = "   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 {uid} 0 {inode} 1 0"
ANY, HERE = "00000000:0000", "0100007F:{port:04X}"
HERE_BY_IPV6 = "0000000000000000FFFF00000100007F:{port:04X}"


def table(*lines: str) -> str:
    return "\n".join([HEAD, *lines]) + "\n"


def line(
    *, local: str = HERE, remote: str = ANY, state: str = "01", uid: int = 1000, inode: int = 77
) -> str:
    """Of a machine whose words are little endian; port 4660 (1234 in hexadecimal)."""
    return LINE.format(
        local=local.format(port=4660),
        remote=remote.format(port=4660),
        state=state,
        uid=uid,
        inode=inode,
    )


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A kernel that knows of nothing; `7` is a process that holds socket 77."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(table())
    descriptors = tmp_path / "7" / "fd"
    descriptors.mkdir(parents=True)
    (descriptors / "0").symlink_to("/dev/null")
    (descriptors / "3").symlink_to("socket:[77]")
    return tmp_path


def says(proc: Path, *lines: str, name: str = "tcp") -> None:
    (proc / "net" / name).write_text(table(*lines))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((ports.LOOPBACK, 0)) as listener:
        yield listener


def test_the_kernel_says_that_this_process_listens(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert ports.listens(os.getpid(), port) is True
    assert ports.listens(os.getppid(), port) is False
    assert ports.listens(2**22 + 1, port) is False  # no such process


def test_the_kernel_says_who_is_connected(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert ports.users_connected(port) == frozenset()
    with socket.create_connection((ports.LOOPBACK, port)):  # not accepted yet
        assert ports.users_connected(port) == {os.getuid()}
    assert ports.users_connected(port) == frozenset()


def test_a_connection_through_an_ipv6_socket_is_seen(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    try:
        client = socket.create_connection((f"::ffff:{ports.LOOPBACK}", port))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with client:
        assert ports.users_connected(port) == {os.getuid()}


def test_a_free_port_is_free() -> None:
    with socket.create_server((ports.LOOPBACK, ports.free_port())):
        pass


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (line(state="0A"), True),
        (line(state="0A", local=HERE_BY_IPV6), True),
        (line(state="01"), False),  # connected, not listening
        (line(state="0A", inode=78), False),  # somebody else's
        (line(state="0A", local=ANY), False),
        (line(state="0A", local="0200007F:{port:04X}"), False),
    ],
)
def test_whose_listener_it_is(proc: Path, entry: str, expected: bool) -> None:
    says(proc, entry)
    assert ports.listens(7, 4660, proc) is expected


def test_without_tables_nothing_can_be_told(tmp_path: Path) -> None:
    assert ports.listens(7, 4660, tmp_path) is None
    assert ports.users_connected(4660, tmp_path) == frozenset()


def test_a_process_that_may_not_be_looked_into(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(proc, line(state="0A"))

    def refused(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    assert ports.listens(7, 4660, proc) is None


def test_only_connections_that_somebody_holds_count(proc: Path) -> None:
    def client(uid: int, state: str, inode: int = 1) -> str:
        return line(local="0100007F:9999", remote=HERE, state=state, uid=uid, inode=inode)

    says(
        proc,
        client(1001, "01"),
        client(1002, "02"),  # on its way
        client(1003, "08"),
        client(0, "06", inode=0),  # TIME_WAIT: nobody's
        client(0, "04", inode=0),  # closed by a process that is gone
        line(state="01", uid=1004),  # the server's own end
        line(local="0100007F:9999", remote="0200007F:1234", uid=1005),
    )
    says(
        proc,
        line(local="0100007F:9999", remote=HERE_BY_IPV6, uid=1006),
        "garbage",
        "",
        name="tcp6",
    )
    assert ports.users_connected(4660, proc) == {1001, 1002, 1003, 1006}

"""Whose a connection is."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.peers.bulk.socket_owner import owner_of
from meshd.peers.bulk.tunneling import TABLES, is_ours

CLIENT, SERVER = ("127.0.0.1", 43_210), ("127.0.0.1", 9_001)
HEAD = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout"
    " inode\n"
)


def word(big_endian: str) -> str:
    """Four bytes as this machine's kernel prints them."""
    return f"{int.from_bytes(bytes.fromhex(big_endian), sys.byteorder):08X}"


V4 = word("7f000001")
V6 = "0" * 16 + word("0000ffff") + V4
OTHER = word("0a000001")


def row(own: str, other: str, *, state: str = "01", uid: str = "1000") -> str:
    return (
        f"   7: {own} {other} {state} 00000000:00000000 00:00000000 00000000  {uid}        0 "
        "98765 1 0000000000000000 20 4 30 10 -1\n"
    )


OURS = row(f"{V4}:A8CA", f"{V4}:2329")


@pytest.mark.parametrize(
    ("rows", "owner"),
    [
        (OURS, 1000),
        (row(f"{V6}:A8CA", f"{V6}:2329", uid="65534"), 65534),
        ("", None),
        (row(f"{V4}:2329", f"{V4}:A8CA"), None),  # the server's own end
        (row(f"{V4}:A8CA", f"{V4}:2328"), None),
        (row(f"{V4}:A8CB", f"{V4}:2329"), None),
        (row(f"{OTHER}:A8CA", f"{V4}:2329"), None),
        (row(f"{V4}:A8CA", f"{V4}:2329", state="04", uid="0"), None),  # closed by its process
        (row(f"{V4}:A8CA", f"{V4}:2329", state="06", uid="0"), None),
        (row(f"{V4}:A8CA", f"{V4}:2329", uid="-"), None),
        (row(f"{V4}:A8CA", f"{V4}:2329", state="06", uid="0") + OURS, 1000),
        (OURS[:40], None),
    ],
)
def test_the_owner_is_that_of_the_clients_end(rows: str, owner: int | None) -> None:
    noise = row(f"{V4}:0016", f"{OTHER}:A8CA", uid="7")
    assert owner_of(HEAD + noise + rows + noise, CLIENT, SERVER) == owner


@given(st.text(alphabet="0123456789ABCDEF: \n", max_size=300))
def test_any_table_is_read(table: str) -> None:
    assert owner_of(table, CLIENT, SERVER) is None
    assert owner_of(table + "\n" + OURS, CLIENT, SERVER) == 1000


# -- this machine's ------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    if not TABLES[0].exists():
        pytest.skip("this platform has no table of connections")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_a_connection_of_this_process_is_ours(listener: socket.socket, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as client:
        client.connect((address, listener.getsockname()[1]))
        with listener.accept()[0] as accepted:
            assert is_ours(accepted)
            table = "".join(path.read_text() for path in TABLES)
            assert owner_of(table, accepted.getpeername(), accepted.getsockname()) == os.getuid()


def test_one_that_its_process_has_closed_is_nobodys(listener: socket.socket) -> None:
    """What a stranger sent before it left must not reach the RPC server."""
    client = socket.create_connection(listener.getsockname())
    client.sendall(b"an order")
    client.close()
    with listener.accept()[0] as accepted:
        assert not is_ours(accepted)


def test_without_a_table_nobody_can_tell(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("meshd.peers.bulk.tunneling.TABLES", (tmp_path / "none",))
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert is_ours(accepted)

"""The network the other tests stand on does what they believe."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.mesh import network as lan
from tests.mesh.network import NAMESPACES, Host, Network
from tests.runtime.processes import ended

pytestmark = pytest.mark.slow

TIMEOUT_S = 0.3


@contextlib.contextmanager
def listening(host: Host, address: str) -> Iterator[socket.socket]:
    with host.inside():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 9000), family=family)
    with server:
        yield server


def reaches(host: Host, address: str) -> bool:
    with host.inside():
        try:
            socket.create_connection((address, 9000), timeout=TIMEOUT_S).close()
        except TimeoutError:
            return False
    return True


def test_hosts_reach_each_other_and_nobody_else(network: Network) -> None:
    a, b = network.add("a"), network.add("b")
    assert b.address
    with listening(b, b.address):
        assert reaches(a, b.address)
        with Network() as other:
            stranger = other.add("stranger"), other.add("twin")
            assert stranger[1].address == b.address
            with pytest.raises(ConnectionRefusedError):
                reaches(stranger[0], b.address)
    with listening(b, b.address6):
        assert reaches(a, b.address6)
    before = Path("/proc/thread-self/ns/net").readlink()
    with a.inside():
        assert Path("/proc/thread-self/ns/net").readlink() != before
    assert Path("/proc/thread-self/ns/net").readlink() == before


def test_a_partition_is_silent_and_heals(network: Network) -> None:
    a, b, c = network.add("a"), network.add("b"), network.add("c")
    assert b.address
    with listening(b, b.address):
        network.isolate(a)
        assert not reaches(a, b.address)
        assert reaches(c, b.address)
        network.heal()
        # Not at once: the kernel asks for the neighbour's address once a second.
        wait_until(lambda: reaches(a, str(b.address)), timeout_s=5, what="reached again")


def test_loss_drops_some(network: Network) -> None:
    a, b = network.add("a"), network.add("b")
    assert a.address
    assert b.address
    sent = 200  # fits into a receive buffer
    with a.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with b.inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((b.address, 9000))
        receiver.settimeout(TIMEOUT_S)
    with sender, receiver:
        sender.sendto(b"for the neighbour's address", (b.address, 9000))
        receiver.recv(64)
        network.lose(20)
        for _ in range(sent):
            sender.sendto(b"x", (b.address, 9000))
        arrived = 0
        with contextlib.suppress(TimeoutError):
            while receiver.recv(64):
                arrived += 1
    assert 0.65 * sent < arrived < 0.92 * sent


@pytest.mark.parametrize("blocked", [False, True])
def test_multicast(network: Network, blocked: bool) -> None:
    a, b = network.add("a"), network.add("b")
    assert a.address
    assert b.address
    group = "224.0.0.251"
    with b.inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("", 9000))
        membership = socket.inet_aton(group) + socket.inet_aton(b.address)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        receiver.settimeout(TIMEOUT_S)
    with a.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(a.address))
    if blocked:
        network.block_multicast()
    with sender, receiver:
        sender.sendto(b"anybody", (group, 9000))
        if blocked:
            with pytest.raises(TimeoutError):
                receiver.recv(64)
        else:
            assert receiver.recv(64) == b"anybody"
    with listening(b, b.address):
        assert reaches(a, b.address)


def test_nothing_is_left(network: Network) -> None:
    with Network() as other:
        host = other.add("gone")
        with host.inside():
            process = subprocess.Popen(["sleep", "60"])
        assert (NAMESPACES / host.namespace).exists()
    assert process.wait(5) == -9
    assert not (NAMESPACES / host.namespace).exists()


_KILLED_RUN = """
import os, subprocess
from tests.mesh.network import Network
network = Network().__enter__()
host = network.add("orphaned")
with host.inside():
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(["sleep", "60"], stdout=quiet, stderr=quiet)
print(host.namespace, child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.usefixtures("_namespaces")
def test_what_a_killed_run_left_is_removed() -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_RUN], capture_output=True, text=True, timeout=60
    )
    namespace, pid = killed.stdout.split()
    assert (NAMESPACES / namespace).exists()
    lan.remove_stale()
    assert not (NAMESPACES / namespace).exists()
    wait_until(lambda: ended(int(pid)), what=f"end of {pid}")

"""A LAN of one's own: network namespaces for hosts, and a bridge in a namespace that joins them.

Nothing touches the machine's own network, so several runs can go on at once. A host's processes
are ordinary children started by a thread that has moved into its namespace; a socket belongs to the
namespace it was made in, so that moving there to open one is all a client needs. What goes wrong
on the wire (partitions, loss, no multicast) happens on the bridge, by nftables: silently, as a
broken switch would.

Needs root, `ip` and `nft`. `bench/mesh.py` uses this too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

NAMESPACES = Path("/run/netns")
PREFIX = "meshd-lan"
SUBNET = "10.77.0"
SUBNET6 = "fd77::"
_CLONE_NEWNET = 0x40000000
_counter = itertools.count(1)


def missing() -> str | None:
    """Why no network can be made here, naming what would help; None if one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian: apt install {package})"
    try:
        with Network() as network:
            network.add("probe")
            network.heal()
    except NetworkError as error:
        return f"network namespaces do not work here: {error}"
    return None


class NetworkError(Exception):
    """A tool refused; the message is its own."""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine on the LAN. Its interface is `eth0`."""

    name: str
    namespace: str
    port: str
    """Its end on the bridge."""
    address: str | None
    """IPv4; None for a host without."""
    address6: str

    def inside(self) -> AbstractContextManager[None]:
        """The calling thread is on this host: sockets it makes and children it starts are too,
        and threads it starts stay there."""
        return _inside(self.namespace)

    def slow_down(self, rate: str) -> None:
        """Let it send no faster than `rate`, as `tc` writes it (`20mbit`)."""
        with self.inside():
            shaper = f"qdisc add dev eth0 root tbf rate {rate} burst 64kb latency 400ms"
            _check(["tc", *shaper.split()])

    def run(
        self, argv: Collection[str], *, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """A command on this host, to its end; whatever its exit code is."""
        with self.inside():
            return subprocess.run(
                list(argv), capture_output=True, text=True, timeout=timeout_s, check=False
            )

    def processes(self) -> list[psutil.Process]:
        """All that run on this host."""
        return _processes(self.namespace)


@dataclass
class _Faults:
    """What the bridge does to frames besides forwarding them."""

    severed: list[tuple[frozenset[str], frozenset[str]]] = field(default_factory=list)
    """Ports whose frames to each other are dropped, both ways."""
    isolated: list[str] = field(default_factory=list)
    """Ports that nothing comes from or goes to."""
    loss_percent: int = 0
    multicast: bool = True


class Network:
    """Hosts and the bridge between them; a context manager that removes all of it.

    Networks of runs that were killed before they could are removed when the next one is made,
    with the processes left in them.
    """

    def __init__(self) -> None:
        remove_stale()
        self._prefix = f"{_own_mark()}.{next(_counter)}"
        self._switch = f"{self._prefix}.switch"
        self._faults = _Faults()
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Network:
        _ip("netns", "add", self._switch)
        _ip_batch(
            self._switch,
            "link set lo up",
            # Without snooping a multicast frame reaches every port, as on a plain switch.
            "link add name br0 type bridge mcast_snooping 0 forward_delay 0",
            "link set br0 up",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts.values():
            _remove(host.namespace)
        self.hosts.clear()
        _remove(self._switch)

    def inside(self) -> AbstractContextManager[None]:
        """The calling thread is in the switch; see `Host.inside`. Frames that hosts send come in at
        interfaces called as their `port`."""
        return _inside(self._switch)

    def add(self, name: str, *, ipv4: bool = True) -> Host:
        """A new host, with IPv6 and, unless told otherwise, IPv4."""
        number = len(self.hosts) + 1
        host = Host(
            name=name,
            namespace=f"{self._prefix}.{name}",
            port=f"port{number}",
            address=f"{SUBNET}.{number}" if ipv4 else None,
            address6=f"{SUBNET6}{number:x}",
        )
        self.hosts[name] = host
        _ip("netns", "add", host.namespace)
        _ip_batch(
            host.namespace,
            "link set lo up",
            f"link add eth0 type veth peer name {host.port} netns {self._switch}",
            # No waiting for somebody to claim the address: this LAN has no strangers.
            *([f"addr add {host.address}/24 dev eth0"] if ipv4 else []),
            f"addr add {host.address6}/64 dev eth0 nodad",
            "link set eth0 up",
        )
        _ip_batch(self._switch, f"link set {host.port} master br0", f"link set {host.port} up")
        return host

    def readdress(self, host: Host, number: int) -> Host:
        """`host` under other addresses, as after a new lease; the old ones are gone."""
        moved = Host(
            name=host.name,
            namespace=host.namespace,
            port=host.port,
            address=f"{SUBNET}.{number}" if host.address else None,
            address6=f"{SUBNET6}{number:x}",
        )
        _ip_batch(
            host.namespace,
            "addr flush dev eth0 scope global",
            *([f"addr add {moved.address}/24 dev eth0"] if moved.address else []),
            f"addr add {moved.address6}/64 dev eth0 nodad",
        )
        self.hosts[host.name] = moved
        return moved

    # -- faults -----------------------------------------------------------------------------------

    def partition(self, some: Collection[Host], others: Collection[Host]) -> None:
        """From now on frames between `some` and `others` vanish. Adds to earlier partitions."""
        sides = frozenset(h.port for h in some), frozenset(h.port for h in others)
        self._faults.severed.append(sides)
        self._apply()

    def isolate(self, host: Host) -> None:
        """Cut `host` off from everybody, those included who come later."""
        self._faults.isolated.append(host.port)
        self._apply()

    def lose(self, percent: int) -> None:
        """Drop each frame with this probability."""
        self._faults.loss_percent = percent
        self._apply()

    def block_multicast(self) -> None:
        """As access points and switches do; ARP and neighbour discovery still work."""
        self._faults.multicast = False
        self._apply()

    def heal(self) -> None:
        """End every fault."""
        self._faults = _Faults()
        self._apply()

    def _apply(self) -> None:
        rules = []
        for some, others in self._faults.severed:
            a, b = _set_of(some), _set_of(others)
            rules += [f"iifname {a} oifname {b} drop", f"iifname {b} oifname {a} drop"]
        for port in self._faults.isolated:
            rules += [f"iifname {port} drop", f"oifname {port} drop"]
        if self._faults.loss_percent:
            rules.append(f"numgen random mod 100 < {self._faults.loss_percent} drop")
        if not self._faults.multicast:
            rules += ["ip daddr 224.0.0.0/4 drop", "ip6 daddr ff02::fb drop"]
        # One transaction: no moment without rules, none with half of them.
        lines = [
            *("table bridge lan", "delete table bridge lan", "table bridge lan {", "chain wire {"),
            "type filter hook forward priority 0",
            *rules,
            *("}", "}"),
        ]
        _check(["ip", "netns", "exec", self._switch, "nft", "-f", "-"], "\n".join(lines) + "\n")


def remove_stale() -> None:
    """Remove networks whose run is over, and end what still runs in them."""
    if not NAMESPACES.is_dir():
        return
    for path in NAMESPACES.glob(f"{PREFIX}.*"):
        _, pid, started, *_ = path.name.split(".")
        if _mark_of(int(pid)) != f"{PREFIX}.{pid}.{started}":
            with contextlib.suppress(NetworkError):  # another run may be at it as well
                _remove(path.name)


# -- steps ----------------------------------------------------------------------------------------


def _own_mark() -> str:
    mark = _mark_of(os.getpid())
    assert mark is not None
    return mark


def _mark_of(pid: int) -> str | None:
    """Names a process for good: the number alone is used again. None if there is none."""
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
    return f"{PREFIX}.{pid}.{round(started * 100)}"


def _remove(namespace: str) -> None:
    if not (NAMESPACES / namespace).exists():
        return
    for process in _processes(namespace):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _ip("netns", "del", namespace)


def _processes(namespace: str) -> list[psutil.Process]:
    found = []
    for pid in _check(["ip", "netns", "pids", namespace]).split():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(NAMESPACES / namespace, os.O_RDONLY)
        try:
            _set_namespace(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _set_namespace(before)
    finally:
        os.close(before)


def _set_of(ports: frozenset[str]) -> str:
    return f"{{ {', '.join(sorted(ports))} }}"


def _ip(*arguments: str) -> None:
    _check(["ip", *arguments])


def _ip_batch(namespace: str, *lines: str) -> None:
    _check(["ip", "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")


def _check(argv: list[str], script: str | None = None) -> str:
    done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _set_namespace(fd: int) -> None:
    """Python has this from 3.12 on, as `os.setns`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise NetworkError(f"setns: {os.strerror(number)}")

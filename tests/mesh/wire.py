"""What crosses the switch of a network while a test looks."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Collection
from types import TracebackType

from tests.mesh.network import Network

ARP, NEIGHBOURS = "arp", "icmpv6 of neighbours"
"""What hosts say to find each other's interfaces."""

_ALL, _OUTGOING = 0x0003, 4  # linux/if_ether.h, linux/if_packet.h
_STATISTICS = (263, 6, 8)  # SOL_PACKET, PACKET_STATISTICS, its bytes
_RCVBUFFORCE = 33
_QUEUE_BYTES = 512 << 20
"""A load sends faster than it is looked at."""
_FRAME_BYTES = 1 << 17
"""Longer than what an interface hands on in one piece for the other end to cut up."""
_QUIET_S = 0.1
_ETHERNET, _IP6_HEADER = 14, 40
_IP4, _ARP, _IP6 = 0x0800, 0x0806, 0x86DD
_OPTIONS, _TCP, _UDP, _ICMP6 = 0, 6, 17, 58
_NEIGHBOUR_TYPES = frozenset({133, 134, 135, 136, 143})
"""RFC 4861; 143 is a host's list of groups it listens to, RFC 3810."""


class Capture:
    """Frames of all hosts while the block runs: how much of what, and which of `needles` are in
    payloads. All of it is known when the block has ended."""

    def __init__(self, network: Network, port: int, needles: Collection[bytes]) -> None:
        self.carried: Counter[str] = Counter()
        """Bytes of payload by protocol. `tcp` is what goes to or from `port`; anything else over
        TCP or UDP is called by its ports."""
        self.found: set[bytes] = set()
        self.dropped = 0
        """Frames that were not looked at, for want of room."""
        self._port = port
        self._needles = needles
        self._enough = threading.Event()
        with network.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _QUEUE_BYTES)
        self._socket.settimeout(_QUIET_S)
        self._thread = threading.Thread(target=self._look, name="looks at the wire")

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._enough.set()
        self._thread.join()
        _, self.dropped = struct.unpack("=II", self._socket.getsockopt(*_STATISTICS))
        self._socket.close()

    def _look(self) -> None:
        while True:
            try:
                frame, (interface, _, direction, *_) = self._socket.recvfrom(_FRAME_BYTES)
            except TimeoutError:
                if self._enough.is_set():
                    return
                continue
            # Every frame passes twice, and those for all hosts once more for the bridge itself.
            if interface.startswith("port") and direction != _OUTGOING:
                self._count(frame)

    def _count(self, frame: bytes) -> None:
        protocol, payload = _read(frame, self._port)
        self.carried[protocol] += len(payload)
        self.found |= {needle for needle in self._needles if needle in payload}


def _read(frame: bytes, port: int) -> tuple[str, bytes]:
    """Its protocol as `Capture.carried` has it, and its payload."""
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == _ARP:
        return ARP, frame[_ETHERNET:]
    if kind == _IP4:
        packet = frame[_ETHERNET:]
        return _transport(packet[9], packet[4 * (packet[0] & 15) :], port)
    if kind != _IP6:
        return f"ethertype {kind:#06x}", frame[_ETHERNET:]
    protocol, rest = frame[_ETHERNET + 6], frame[_ETHERNET + _IP6_HEADER :]
    if protocol == _OPTIONS:
        protocol, rest = rest[0], rest[8 * (1 + rest[1]) :]
    return _transport(protocol, rest, port)


def _transport(protocol: int, packet: bytes, port: int) -> tuple[str, bytes]:
    if protocol == _ICMP6 and packet[0] in _NEIGHBOUR_TYPES:
        return NEIGHBOURS, packet
    if protocol not in (_TCP, _UDP):
        return f"ip protocol {protocol}", packet
    ports = struct.unpack_from("!HH", packet)
    if protocol == _UDP:
        return f"udp {ports}", packet[8:]
    return ("tcp" if port in ports else f"tcp {ports}"), packet[4 * (packet[12] >> 4) :]

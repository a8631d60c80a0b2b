"""What nodes say of themselves on the LAN, as the TXT record of a DNS service. Pure.

Service `_meshd._tcp.local.`, one instance a node, named by the beginning of its id. TXT: `mesh` and
`meshname`, `node` and `name`, `proto` (range of the protocol), `at` (addresses, comma-separated).
Anybody on the LAN can say anything here; what does not parse is ignored.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshd.config import is_address, is_loopback, split_address
from meshd.ids import MeshId, NodeId
from meshd.peers.lan.addresses import join_address
from meshd.peers.protocol import PROTOCOL, Range

SERVICE_TYPE: Final = "_meshd._tcp.local."
MAX_FOUND_ADDRESSES: Final = 8

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_FIELDS: Final = {
    b"mesh": re.compile(r"[0-9a-f]{32}"),
    b"meshname": _NAME,
    b"node": re.compile(r"[a-z2-7]{52}"),
    b"name": _NAME,
    b"proto": re.compile(r"\d{1,5}-\d{1,5}"),
}
_TXT_BYTES: Final = 255


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a member says of itself on the LAN."""

    mesh_id: MeshId
    mesh_name: str
    node_id: NodeId
    name: str
    port: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a service on the LAN says of itself; nothing of it is proved."""

    node_id: NodeId
    mesh_id: MeshId
    mesh_name: str
    name: str
    protocol: Range
    addresses: tuple[str, ...]


def read_service(
    properties: Mapping[bytes, bytes | None], port: int | None, ips: list[str]
) -> Found | None:
    """What a service says, or None if it is none of ours. Pure; never raises.

    Addresses: those of `at` first, then those of the records. Link-local IPv6 is left out: it means
    nothing without the interface it came from.
    """
    said: dict[bytes, str] = {}
    for key, pattern in _FIELDS.items():
        text = (properties.get(key) or b"").decode("ascii", errors="replace")
        if not pattern.fullmatch(text):
            return None
        said[key] = text
    at = (properties.get(b"at") or b"").decode("ascii", errors="replace").split(",")
    addresses = [address for address in at if is_address(address) and len(address) <= _TXT_BYTES]
    if port is not None and 0 < port <= 65_535:
        addresses += [join_address(ip, port) for ip in ips if dialable(ip)]
    low, high = said[b"proto"].split("-")
    return Found(
        node_id=NodeId(said[b"node"]),
        mesh_id=MeshId(said[b"mesh"]),
        mesh_name=said[b"meshname"],
        name=said[b"name"],
        protocol=(int(low), int(high)),
        addresses=tuple(dict.fromkeys(addresses))[:MAX_FOUND_ADDRESSES],
    )


def properties_of(announcement: Announcement) -> dict[str, str]:
    """The TXT record; `at` holds as many addresses as fit into one string of it."""
    at = ""
    for address in announcement.addresses:
        longer = f"{at},{address}" if at else address
        if len(longer) + len("at=") <= _TXT_BYTES:
            at = longer
    return {
        "mesh": announcement.mesh_id,
        "meshname": announcement.mesh_name,
        "node": announcement.node_id,
        "name": announcement.name,
        "proto": f"{PROTOCOL[0]}-{PROTOCOL[1]}",
        "at": at,
    }


def only_here(addresses: tuple[str, ...]) -> bool:
    return bool(addresses) and all(is_loopback(split_address(a)[0]) for a in addresses)


def dialable(host: str) -> bool:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (ip.version == 6 and ip.is_link_local)

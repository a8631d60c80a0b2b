"""At which addresses other nodes can reach this one.

What a node tells others must be worth dialling: an address of a bridge that exists on every machine
(`docker0` is 172.17.0.1 everywhere) leads them astray, so such addresses come last.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

log = logging.getLogger(__name__)

MAX_ADDRESSES = 4
"""As many as a statement of a node may carry."""

_OVERLAYS = ("tailscale", "wg", "tun", "tap", "zt", "nebula", "utun", "ppp")
_BRIDGES = ("docker", "br-", "veth", "virbr", "vnet", "cni", "flannel", "cali", "lxc", "lxd",
            "podman", "kube", "vmnet", "vboxnet", "bridge")  # fmt: skip

_Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def advertised_addresses(
    listen_host: str, port: int, advertise: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """HOST:PORT of this node for others, most promising first, at most `MAX_ADDRESSES`.

    `listen_host` and `port`: what the peer port is bound to. `advertise`: the user's own words,
    which come first. Reads the network interfaces (some 100 µs); never raises.
    """
    return choose_addresses(read_interfaces(), listen_host, port, advertise)


def read_interfaces() -> tuple[tuple[str, str], ...]:
    """(interface, IP) of every interface that is up. Empty if the system does not say."""
    import ifaddr  # late: not every command needs ctypes

    found: list[tuple[str, str]] = []
    try:
        for adapter in ifaddr.get_adapters():
            if _is_up(adapter.name):
                found += [
                    (adapter.name, ip.ip if isinstance(ip.ip, str) else ip.ip[0])
                    for ip in adapter.ips
                ]
    except OSError as error:
        log.warning("the network interfaces cannot be listed: %s", error.strerror)
    return tuple(found)


def on_own_network(ip: str) -> bool:
    """Whether `ip` is on a network this machine has an address in, and so in reach of multicast."""
    import ifaddr  # late, as above

    try:
        wanted = ipaddress.ip_address(ip.partition("%")[0])
        adapters = list(ifaddr.get_adapters())
    except (ValueError, OSError):
        return False
    for adapter in adapters:
        for own in adapter.ips:
            address = own.ip if isinstance(own.ip, str) else own.ip[0]
            network = ipaddress.ip_network(f"{address}/{own.network_prefix}", strict=False)
            if wanted in network:
                return True
    return False


def choose_addresses(
    interfaces: Iterable[tuple[str, str]],
    listen_host: str,
    port: int,
    advertise: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """`advertised_addresses` for given interfaces; pure.

    1. What the user said, in that order.
    2. A node that listens on one address has that one.
    3. One that listens on all has those of its interfaces: of the LAN, then overlays, then bridges;
       IPv4 first, but one place is kept for IPv6. `0.0.0.0` is IPv4 only, `::` is both.
    4. Loopback only if there is nothing else: then every peer is on this machine.
    """
    own: list[str]
    if listen_host not in ("0.0.0.0", "::"):
        own = [join_address(listen_host, port)]  # 2
    else:
        ranked = sorted(
            {
                (_rank(name), ip.version, _reach(ip), int(ip)): ip
                for name, ip in _parsed(interfaces)
                if _worth_dialling(ip) and (ip.version == 4 or listen_host == "::")
            }.items()
        )
        own = [join_address(str(ip), port) for ip in _mixed([ip for _, ip in ranked])]  # 3
        if not own:
            own = [join_address("127.0.0.1" if listen_host == "0.0.0.0" else "::1", port)]  # 4
    return tuple(dict.fromkeys((*advertise, *own)))[:MAX_ADDRESSES]  # 1


def join_address(host: str, port: int) -> str:
    """The inverse of `config.split_address`: brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- ranking --------------------------------------------------------------------------------------


def _parsed(interfaces: Iterable[tuple[str, str]]) -> Iterable[tuple[str, _Ip]]:
    for name, text in interfaces:
        try:
            yield name, ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            continue


def _worth_dialling(ip: _Ip) -> bool:
    """A link-local IPv6 address means nothing without the interface it was read from."""
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast:
        return False
    return ip.version == 4 or not ip.is_link_local


def _rank(interface: str) -> int:
    name = interface.lower()
    if name.startswith(_BRIDGES):
        return 2
    return 1 if name.startswith(_OVERLAYS) else 0


def _reach(ip: _Ip) -> int:
    """Private addresses first: peers are mostly near. 169.254/16 is what a machine without DHCP
    gives itself."""
    if ip.is_link_local:
        return 2
    return 0 if ip.is_private else 1


def _mixed(ips: list[_Ip]) -> list[_Ip]:
    """The first `MAX_ADDRESSES`, the last of them IPv6 if there is any and none would be in."""
    first = ips[:MAX_ADDRESSES]
    rest6 = next((ip for ip in ips if ip.version == 6), None)
    if rest6 is not None and rest6 not in first:
        first[-1] = rest6
    return first


def _is_up(interface: str) -> bool:
    """Where the system tells (Linux); a cable that is pulled out or an idle `docker0` is down."""
    name = interface.partition(":")[0]
    try:
        return Path(f"/sys/class/net/{name}/operstate").read_text().strip() != "down"
    except OSError:
        return True

"""Which addresses a node tells others, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.config import split_address
from meshd.peers.lan.addresses import (
    MAX_ADDRESSES,
    advertised_addresses,
    choose_addresses,
    join_address,
    read_interfaces,
)

LOOPBACK = (("lo", "127.0.0.1"), ("lo", "::1"))
STUDY = (
    *LOOPBACK,
    ("docker0", "172.17.0.1"),
    ("eth0", "fe80::1"),
    ("eth0", "2001:db8::7"),
    ("eth0", "192.168.1.7"),
    ("tailscale0", "100.64.0.9"),
)


def test_the_lan_comes_before_overlays_and_bridges() -> None:
    assert choose_addresses(STUDY, "0.0.0.0", 9338) == (
        "192.168.1.7:9338",
        "100.64.0.9:9338",
        "172.17.0.1:9338",
    )


def test_all_of_ipv6_is_both_families() -> None:
    assert choose_addresses(STUDY, "::", 9338) == (
        "192.168.1.7:9338",
        "[2001:db8::7]:9338",
        "100.64.0.9:9338",
        "172.17.0.1:9338",
    )


def test_what_the_user_says_comes_first_and_is_not_repeated() -> None:
    said = ("home.example:4444", "192.168.1.7:9338")
    assert choose_addresses(STUDY, "0.0.0.0", 9338, said) == (
        "home.example:4444",
        "192.168.1.7:9338",
        "100.64.0.9:9338",
        "172.17.0.1:9338",
    )
    many = tuple(f"h{n}:1" for n in range(6))
    assert choose_addresses(STUDY, "0.0.0.0", 9338, many) == many[:MAX_ADDRESSES]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:5"),
        ("::1", "[::1]:5"),
        ("10.1.2.3", "10.1.2.3:5"),
        ("node.example", "node.example:5"),
    ],
)
def test_a_node_that_listens_on_one_address_has_that_one(host: str, address: str) -> None:
    assert choose_addresses(STUDY, host, 5) == (address,)


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", "127.0.0.1:5"), ("::", "[::1]:5")])
def test_loopback_only_if_there_is_nothing_else(host: str, address: str) -> None:
    assert choose_addresses(LOOPBACK, host, 5) == (address,)
    assert choose_addresses((), host, 5) == (address,)


def test_only_link_local_ipv6_is_nothing_to_dial() -> None:
    assert choose_addresses((("eth0", "fe80::1%eth0"),), "::", 5) == ("[::1]:5",)


def test_a_place_is_kept_for_ipv6() -> None:
    crowd = [("eth0", f"10.0.0.{n}") for n in range(1, 9)]
    found = choose_addresses([*crowd, ("wg0", "fd00::5")], "::", 9)
    assert found == ("10.0.0.1:9", "10.0.0.2:9", "10.0.0.3:9", "[fd00::5]:9")
    only_bridge = choose_addresses([("docker0", "172.17.0.1"), ("br-1", "fd01::1")], "::", 9)
    assert only_bridge == ("172.17.0.1:9", "[fd01::1]:9")


def test_an_address_of_ones_own_making_comes_last_on_its_wire() -> None:
    found = choose_addresses(
        [("eth0", "169.254.9.9"), ("eth1", "203.0.113.4"), ("eth2", "192.168.0.2")], "0.0.0.0", 1
    )
    assert found == ("192.168.0.2:1", "203.0.113.4:1", "169.254.9.9:1")


def test_rubbish_from_the_system_is_left_out() -> None:
    assert choose_addresses([("x", "nonsense"), ("x", "224.0.0.1")], "0.0.0.0", 1) == (
        "127.0.0.1:1",
    )


interfaces = st.lists(
    st.tuples(
        st.sampled_from(["lo", "eth0", "docker0", "wg1", "br-3"]),
        st.ip_addresses().map(str) | st.sampled_from(["127.0.0.1", "10.0.0.1", "fe80::1%eth0"]),
    ),
    max_size=12,
)


@given(interfaces, st.sampled_from(["0.0.0.0", "::"]))
def test_the_order_of_the_system_does_not_matter(found: list[tuple[str, str]], host: str) -> None:
    chosen = choose_addresses(found, host, 7)
    assert 1 <= len(chosen) <= MAX_ADDRESSES
    assert choose_addresses(found[::-1], host, 7) == chosen
    for address in chosen:
        name, port = split_address(address)
        assert join_address(name, port) == address


def test_this_machine_has_some() -> None:
    assert ("lo", "127.0.0.1") in read_interfaces()
    assert advertised_addresses("0.0.0.0", 9338, ("h:1",))[0] == "h:1"
    assert len(advertised_addresses("0.0.0.0", 9338)) >= 1

"""What this node lends, and which other nodes could lend to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshd.election.fit import Budget
from meshd.election.lenders import candidates, lendable
from meshd.election.splitting import Candidate
from meshd.ids import NodeId
from meshd.view import Lendable, PeerState, PeerView, Role, View
from tests.election.rooms import OTHER, a_peer, a_view

GB = 10**9
GPU = Budget("CUDA0", 24 * GB, host=False, accelerator=True)
MAIN = Budget("CPU", 64 * GB, host=True, accelerator=False)
SHARED = Budget("MTL0", 48 * GB, host=True, accelerator=True)
LENDS = (Lendable("CUDA0", 16 * GB, accelerator=True),)
PEER = a_peer(lends=LENDS, rpc_protocol="7.0.0", rtt_s=0.0004)


def seen(**changes: Any) -> View:
    return replace(a_view(), peers=(replace(PEER, **changes),))


def only(view: View, **more: Any) -> Candidate:
    (found,) = candidates(view, more.get("avoided", ()), more.get("bytes_per_s", {}))
    return found


# -- lending --------------------------------------------------------------------------------------


def test_accelerators_are_lent_and_main_memory_where_there_are_none() -> None:
    free = {"CUDA0": 16 * GB, "CPU": 64 * GB, "MTL0": 32 * GB}
    assert lendable((MAIN, GPU), free) == (Lendable("CUDA0", 15_569_256_448, accelerator=True),)
    (main,) = lendable((MAIN,), free)
    assert (main.device, main.accelerator) == ("CPU", False)
    (shared,) = lendable((SHARED,), free)
    assert (shared.device, shared.accelerator) == ("MTL0", True)
    assert lendable((), free) == ()


def test_how_fast_it_is_is_told_with_it() -> None:
    fast, unknown = lendable((replace(GPU, bytes_per_s=10**12), replace(GPU, device="CUDA1")), {})
    assert (fast.bytes_per_s, unknown.bytes_per_s) == (10**12, None)


def test_what_is_lent_is_what_no_lease_has_and_is_told_coarsely() -> None:
    (one,) = lendable((GPU,), {"CUDA0": 1000})
    (other,) = lendable((GPU,), {"CUDA0": 999})
    assert one.free_bytes == other.free_bytes == 992
    assert lendable((GPU,), {}) == (Lendable("CUDA0", 0, accelerator=True),)


# -- candidates -----------------------------------------------------------------------------------


def test_a_node_that_can_be_asked() -> None:
    found = only(seen())
    assert (found.node, found.name, found.lends) == (OTHER, "beta", LENDS)
    assert (found.rpc_protocol, found.barred) == ("7.0.0", None)


@pytest.mark.parametrize(
    ("changes", "barred"),
    [
        ({"role": Role.CLIENT}, "a client node lends nothing"),
        ({"state": PeerState.SUSPECT}, "it is suspect"),
        ({"draining": True}, "it is draining"),
    ],
)
def test_a_node_that_cannot_is_told_with_the_reason(changes: dict[str, Any], barred: str) -> None:
    assert only(seen(**changes)).barred == barred


@pytest.mark.parametrize("state", [PeerState.DEAD, PeerState.LEFT])
def test_who_is_gone_is_not_spoken_of(state: PeerState) -> None:
    assert candidates(seen(state=state), (), {}) == ()


def test_who_refused_or_was_lost_a_moment_ago_is_left_out() -> None:
    assert only(seen(), avoided={OTHER}).barred == "it refused, or was lost, a moment ago"
    assert only(seen(), avoided={NodeId("z")}).barred is None


def test_they_come_by_id_whatever_their_order_in_the_view() -> None:
    peers = tuple(PeerView(NodeId(n), n, PeerState.ALIVE, version="1") for n in "cab")
    found = candidates(replace(a_view(), peers=peers), (), {})
    assert [c.name for c in found] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rtt_s", "told_s"),
    [
        (None, None),
        (0.0, 0.00025),
        (0.0002, 0.00025),
        (0.0003, 0.0005),
        (0.00045, 0.0005),
        (0.0008, 0.001),
        (0.020, 0.032),
    ],
)
def test_round_trips_come_in_steps(rtt_s: float | None, told_s: float | None) -> None:
    assert only(seen(rtt_s=rtt_s)).rtt_s == told_s


@pytest.mark.parametrize(
    ("measured", "told"), [(None, None), (0.0, None), (1.5e8, 2.0**27), (2.0**27, 2.0**27)]
)
def test_bandwidth_comes_in_doublings(measured: float | None, told: float | None) -> None:
    rates = {} if measured is None else {OTHER: measured}
    assert only(seen(), bytes_per_s=rates).bytes_per_s == told

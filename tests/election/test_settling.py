"""When a node that has just started knows enough of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.election.settling import ADVERTS_S, SETTLE_S, Settling
from meshd.view import MeshState, PeerState, View
from tests.election.rooms import a_peer, a_view

NOW = 100.0
ALONE = a_view()
SILENT = replace(ALONE, peers=(a_peer(version=""),))
HEARD = replace(ALONE, peers=(a_peer(),))


def left(view: View, now: float, settling: Settling, *, expects_others: bool = True) -> float:
    return settling.left_s(view, now, expects_others=expects_others)


def test_a_member_alone_waits_for_nobody() -> None:
    settling = Settling(NOW)
    assert left(ALONE, NOW, settling, expects_others=False) == 0.0
    assert settling.over


@pytest.mark.parametrize("state", [MeshState.JOINING, MeshState.NONE, MeshState.REFUSED])
def test_who_is_no_member_yet_may_have_others(state: MeshState) -> None:
    settling = Settling(NOW)
    view = replace(ALONE, mesh=replace(ALONE.mesh, state=state))
    assert left(view, NOW, settling, expects_others=False) == SETTLE_S


def test_others_that_say_nothing_are_waited_for_so_long() -> None:
    settling = Settling(NOW)
    assert left(SILENT, NOW + 1.0, settling) == SETTLE_S - 1.0
    assert not settling.over
    assert left(SILENT, NOW + SETTLE_S, settling) == 0.0
    assert settling.over


def test_after_the_first_advert_the_others_have_a_moment() -> None:
    settling = Settling(NOW)
    assert left(HEARD, NOW + 1.0, settling) == pytest.approx(ADVERTS_S)
    assert left(HEARD, NOW + 1.1, settling) == pytest.approx(ADVERTS_S - 0.1)
    assert left(HEARD, NOW + 1.0 + ADVERTS_S, settling) == 0.0


def test_the_dead_say_nothing() -> None:
    dead = replace(ALONE, peers=(a_peer(state=PeerState.DEAD),))
    assert left(dead, NOW, Settling(NOW)) == SETTLE_S


def test_it_is_over_once() -> None:
    settling = Settling(NOW)
    left(ALONE, NOW, settling, expects_others=False)
    assert left(HEARD, NOW, settling) == 0.0

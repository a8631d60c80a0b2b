"""What nodes say of themselves, out of the view."""

from __future__ import annotations

from dataclasses import replace

from meshd.election.standings import Standings, myself, others
from meshd.election.words import Standing
from meshd.ids import NodeId
from meshd.view import Bid, Claim, ClaimState, NodeState, PeerState, PeerView, Role, Suits
from tests.election.rooms import LLAMA, OWN, a_view

BID = Bid(LLAMA, 1, Suits.YES)
CLAIM = Claim(LLAMA, 7, ClaimState.READY, 3)


def peer(name: str, state: PeerState = PeerState.ALIVE, **changes: object) -> PeerView:
    return replace(PeerView(NodeId(name), name, state, version="1"), **changes)  # type: ignore[arg-type]


def test_those_that_can_be_reached_count_in_the_order_of_their_ids() -> None:
    peers = (
        peer("d", PeerState.DEAD),
        peer("c", PeerState.SUSPECT, draining=True),
        peer("b", role=Role.CLIENT),
        peer("l", PeerState.LEFT),
        peer("a", bids=(BID,), claims=(CLAIM,)),
    )
    assert others(replace(a_view(), peers=peers)) == (
        Standing(NodeId("a"), "a", {LLAMA: BID}, {LLAMA: CLAIM}),
        Standing(NodeId("b"), "b", hosts=False),
        Standing(NodeId("c"), "c", draining=True),
    )


def test_this_node_is_seen_as_others_see_it() -> None:
    view = replace(a_view(), bids=(BID,), claims=(CLAIM,))
    assert myself(view) == Standing(OWN, "alpha", {LLAMA: BID}, {LLAMA: CLAIM})
    draining = replace(view, node=replace(view.node, state=NodeState.DRAINING))
    assert myself(draining).draining
    assert not myself(a_view(role=Role.CLIENT)).hosts


def test_what_did_not_change_is_the_same_object() -> None:
    view = replace(a_view(), peers=(peer("a", bids=(BID,)), peer("b")))
    standings = Standings()
    first = standings.others(view)
    assert first == others(view)
    moved = replace(view, peers=tuple(replace(p, rtt_s=0.1) for p in view.peers))
    assert standings.others(moved) is first
    bid = replace(BID, headroom=3)
    told = replace(view, peers=(replace(view.peers[0], bids=(bid,)), view.peers[1]))
    changed = standings.others(told)
    assert changed == others(told)
    assert changed[0] is not first[0]
    assert changed[1] is first[1]
    gone = replace(view, peers=view.peers[:1])
    assert standings.others(gone) == others(gone)
    assert standings.others(replace(view, peers=())) == ()


def test_every_word_that_matters_is_noticed() -> None:
    view, standings = replace(a_view(), peers=(peer("a"),)), Standings()
    for changes in (
        {"claims": (CLAIM,)},
        {"bids": (BID,)},
        {"draining": True},
        {"role": Role.CLIENT},
        {"name": "z"},
    ):
        told = replace(view, peers=(replace(view.peers[0], **changes),))
        assert standings.others(view) == others(view)
        assert standings.others(told) == others(told) != others(view)

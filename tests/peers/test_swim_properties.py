"""The membership machine under anything: never raises, never goes back, stays small."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.peers.swim.broadcasts import MESSAGE_BYTES
from meshd.peers.swim.gossip import (
    Ack,
    Alive,
    Dead,
    DialRefused,
    Digest,
    Event,
    Gossip,
    LinkLost,
    MemberChanged,
    MessageReceived,
    Nack,
    NodeMet,
    NodeRevoked,
    Ping,
    PingReq,
    SelfStated,
    Send,
    StateSelf,
    Suspect,
    Sync,
    Update,
    encoded_size,
)
from meshd.peers.swim.swim import Swim
from meshd.peers.swim.timing import LAN
from meshd.view import PeerState

ME = NodeId("m")
OTHERS = [NodeId(name) for name in "abcz"]

nodes = st.sampled_from([*OTHERS, ME])
small = st.integers(0, 5)
absurd = st.one_of(small, st.integers(-3, 3), st.integers(), st.just(10**60), st.just(2**53 - 1))
addresses = st.sampled_from([(), ("h:1",), ("h:1", "[::1]:2")])


def alives(
    node: st.SearchStrategy[NodeId], number: st.SearchStrategy[int]
) -> st.SearchStrategy[Alive]:
    return st.builds(Alive, node, number, number, addresses, st.booleans(), st.binary(max_size=2))


def updates_of(number: st.SearchStrategy[int]) -> st.SearchStrategy[Update]:
    accusations = st.one_of(
        st.builds(Suspect, nodes, number, nodes), st.builds(Dead, nodes, number, nodes)
    )
    return st.one_of(alives(nodes, number), accusations)


some = st.lists(updates_of(absurd), max_size=4).map(tuple)
buckets = st.one_of(
    st.lists(absurd, max_size=20).map(tuple), st.lists(small, min_size=16, max_size=16).map(tuple)
)
messages = st.one_of(
    st.builds(Ping, absurd, some),
    st.builds(Ack, absurd, some),
    st.builds(PingReq, absurd, nodes, some),
    st.builds(Nack, absurd, some),
    st.builds(Gossip, some),
    st.builds(Digest, buckets, st.booleans()),
    st.builds(Sync, buckets, some, st.booleans()),
)
events = st.one_of(
    st.builds(MessageReceived, nodes, messages),
    st.builds(NodeMet, alives(nodes, absurd)),
    st.builds(LinkLost, nodes),
    st.builds(DialRefused, nodes),
    st.builds(SelfStated, alives(st.just(ME), absurd)),
    st.builds(NodeRevoked, st.sampled_from(OTHERS[:1])),
    st.just(Tick()),
)
steps = st.lists(st.tuples(events, st.sampled_from([0.0, 0.01, 0.3, 2.0, 100.0])), max_size=40)


def check(swim: Swim, effects: Sequence[object], known: dict[NodeId, int]) -> None:
    for effect in effects:
        match effect:
            case MemberChanged(node=node, new=None):
                known.pop(node, None)
            case Send(to=to, message=Ping() | Ack() | Nack() | PingReq() | Gossip() as message):
                assert to != ME
                assert sum(map(encoded_size, message.updates)) <= 2 * MESSAGE_BYTES
            case StateSelf(incarnation):
                assert 0 < incarnation < 2**53
            case _:
                pass
    for node, member in swim.members.items():
        assert member.incarnation >= known.get(node, -1)
        known[node] = member.incarnation
    assert ME not in swim.members


@given(steps)
def test_no_event_raises_and_no_incarnation_goes_back(
    script: list[tuple[Event, float]],
) -> None:
    swim = Swim(ME, LAN, random.Random(1))
    twin = Swim(ME, LAN, random.Random(1))
    known: dict[NodeId, int] = {}
    now = 0.0
    for event, pause in script:
        effects = swim.handle(event, now)
        assert twin.handle(event, now) == effects
        check(swim, effects, known)
        end = now + pause
        while (due := swim.due()) is not None and due <= end:
            now = max(now, due)
            check(swim, swim.handle(Tick(), now), known)
            twin.handle(Tick(), now)
        now = end


@given(st.lists(updates_of(small), max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_news_does_not_matter(updates: list[Update], chance: random.Random) -> None:
    def table(order: list[Update]) -> dict[NodeId, tuple[PeerState, int, int, tuple[str, ...]]]:
        swim = Swim(ME, LAN, random.Random(1))
        for update in order:
            swim.handle(MessageReceived(OTHERS[0], Gossip((update,))), 1.0)
        return {
            m.node: (m.state, m.incarnation, m.version, m.addresses) for m in swim.members.values()
        }

    shuffled = list(updates)
    chance.shuffle(shuffled)
    assert table(shuffled) == table(updates)
    assert table([*updates, *updates]) == table(updates)


@settings(max_examples=5)
@given(st.integers(0, 2**32))
def test_a_flood_of_strangers_stays_within_bounds(seed: int) -> None:
    """Made-up nodes, accused; pings for others; questions that cost answers."""
    chance = random.Random(seed)
    swim = Swim(ME, LAN, random.Random(seed))
    swim.handle(SelfStated(Alive(ME, 1, 1, (), False, b"")), 0.0)
    now, sent = 0.0, 0
    for i in range(1500):
        made_up = [NodeId(f"n{chance.randrange(10**6)}") for _ in range(4)]
        accusations = tuple(Suspect(node, chance.randrange(10), ME) for node in made_up)
        for message in (
            Gossip(accusations),
            PingReq(i, made_up[0]),
            Digest((1,) * 16, answer=True),
        ):
            sent += len(swim.handle(MessageReceived(made_up[1], message), now))
        now += 0.001
    assert len(swim.members) <= 4096
    assert len(swim._out.news) <= 512
    assert len(swim._agenda._heap) < 4 * 4096 + 2048
    assert sent < 40_000

"""Which of two links stays, and what a link does with what it is sent."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from meshd.ids import BootId, NodeId
from meshd.peers.links.frames import CONTROL_LIMIT, frame
from meshd.peers.links.links import (
    BACKLOG_BYTES,
    GOSSIP_BACKLOG_BYTES,
    ControlLink,
    LinkTable,
    Remote,
    keeps,
)
from meshd.view import Role

OWN, OTHER = NodeId("b" * 52), NodeId("m" * 52)
REMOTE = Remote(OTHER, Role.MEMBER, BootId("1" * 16), "other", "1", dialled=True, address="h:1")


class Wire(asyncio.Transport):
    """Keeps what is written; `backlog` bytes of it pretend to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.backlog = 0
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.backlog

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class Heard:
    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.ends: list[bool] = []

    def link(self, remote: Remote = REMOTE) -> tuple[ControlLink, Wire]:
        link = ControlLink(
            remote, lambda _, f: self.frames.append(f), lambda _, broke: self.ends.append(broke)
        )
        wire = Wire()
        link.connection_made(wire)
        return link, wire


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.mark.parametrize(("own", "other"), [("b", "m"), ("m", "b")])
def test_both_ends_keep_the_same_of_two_links(own: str, other: str) -> None:
    """For every pair of links, whichever each end saw first."""
    here, there = NodeId(own * 52), NodeId(other * 52)
    for first_by_here, second_by_here in product((True, False), repeat=2):
        at_here = [replace(REMOTE, node=there, dialled=d) for d in (first_by_here, second_by_here)]
        at_there = [replace(REMOTE, node=here, dialled=not r.dialled) for r in at_here]
        if first_by_here == second_by_here:
            # One side dialled twice: both ends saw them in the order they were made.
            assert not keeps(at_here[0], at_here[1], here)
            assert not keeps(at_there[0], at_there[1], there)
        else:
            stays_here = 0 if keeps(at_here[0], at_here[1], here) else 1
            stays_there = 1 if keeps(at_there[1], at_there[0], there) else 0
            assert stays_here == stays_there


def test_a_new_boot_takes_the_place_of_the_old_process() -> None:
    new = replace(REMOTE, boot=BootId("2" * 16), dialled=False)
    assert not keeps(REMOTE, new, OWN)


def test_the_table_says_goodbye_to_the_loser(heard: Heard) -> None:
    table = LinkTable(OWN)
    first, first_wire = heard.link()
    assert table.add(first)
    second, second_wire = heard.link(replace(REMOTE, dialled=False))
    assert not table.add(second)  # ours is the smaller id, so the one we dialled stays
    assert b'"bye"' in second_wire.written
    assert second_wire.closed
    assert not first_wire.closed
    third, _ = heard.link(replace(REMOTE, boot=BootId("2" * 16)))
    assert table.add(third)
    assert b'"bye"' in first_wire.written
    assert table.get(OTHER) is third
    assert not table.remove(first)
    assert table.remove(third)
    assert len(table) == 0


def test_an_end_without_goodbye_is_a_break(heard: Heard) -> None:
    link, _ = heard.link()
    link.connection_lost(None)
    link.connection_lost(None)
    assert heard.ends == [True]


@pytest.mark.parametrize("how", ["ours", "theirs", "dropped"])
def test_an_end_after_a_goodbye_is_none(heard: Heard, how: str) -> None:
    link, wire = heard.link()
    if how == "ours":
        link.part("closing")
    elif how == "theirs":
        link.data_received(frame({"t": "bye", "why": "closing"}))
        link.data_received(frame({"t": "ping"}))
    else:
        link.drop()
    assert wire.is_closing()
    link.connection_lost(None)
    assert heard.ends == [False]
    assert heard.frames == []


def test_frames_arrive_whole_and_in_order(heard: Heard) -> None:
    link, _ = heard.link()
    data = frame({"n": 1}) + frame({"n": 2}) + frame({"n": 3})
    for place in range(len(data)):
        link.data_received(data[place : place + 1])
    assert heard.frames == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert link.bytes_in == len(data)


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", (CONTROL_LIMIT + 1).to_bytes(4)]
)
def test_what_is_no_frame_ends_the_link(heard: Heard, data: bytes) -> None:
    link, wire = heard.link()
    link.data_received(data)
    assert wire.aborted
    assert heard.frames == []


def test_a_peer_that_does_not_read_loses_gossip_first_and_its_link_at_last(heard: Heard) -> None:
    link, wire = heard.link()
    wire.backlog = GOSSIP_BACKLOG_BYTES + 1
    assert not link.send({"t": "ping"}, droppable=True)
    assert link.send({"t": "deny"})
    wire.backlog = BACKLOG_BYTES + 1
    assert not link.send({"t": "deny"})
    assert wire.aborted
    assert not link.send({"t": "deny"})

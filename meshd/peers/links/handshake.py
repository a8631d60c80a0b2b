"""The first words on a control link, from both ends.

The dialler speaks first. The listener judges, then either answers with its own hello, which is its
consent, or with a refusal. A refused TLS 1.3 client has seen a handshake succeed and learns of it
only here, so nothing of a link is believed before the other side's hello.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from meshd.errors import PeerRefused, ProtocolError
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.codec import alive_from_wire, alive_to_wire
from meshd.peers.links.hello import Hello, judge, parse_hello, refusal
from meshd.peers.swim.gossip import Alive

MAX_DOCTOR_PINGS = 64


async def greet(channel: FrameChannel, ours: Hello) -> Hello:
    """The dialler's part: what the other side says of itself, once it has consented.

    Raises PeerRefused (either side's), ProtocolError, PeerUnreachable. The caller bounds the time.
    """
    channel.send(ours.to_wire())
    theirs = parse_hello(await channel.read())
    objection = judge(ours, theirs)
    if objection is not None:
        channel.send(refusal(objection))
        raise objection
    return theirs


async def welcome(
    channel: FrameChannel, ours: Hello, check: Callable[[Hello], Awaitable[PeerRefused | None]]
) -> Hello:
    """The listener's part. `check`: further objections, asked after `judge`.

    Raises PeerRefused after having sent the words, ProtocolError, PeerUnreachable.
    """
    theirs = parse_hello(await channel.read())
    objection = judge(ours, theirs) or await check(theirs)
    if objection is not None:
        channel.send(refusal(objection))
        raise objection
    channel.send(ours.to_wire())
    return theirs


async def attend_doctor(channel: FrameChannel) -> None:
    """Answer the pings of a `doctor` connection until it closes; the caller bounds the time."""
    for _ in range(MAX_DOCTOR_PINGS):
        value = await channel.read()
        if value.get("t") != "ping" or type(value.get("n")) is not int:
            raise ProtocolError("a doctor sends pings")
        channel.send({"t": "pong", "n": value["n"]})


def statement_to_hello(alive: Alive) -> dict[str, Any]:
    return {"alive": alive_to_wire(alive)}


def statement_of(hello: Hello) -> Alive:
    """The signed statement in a hello, its signature not yet checked. Raises ProtocolError."""
    if hello.statement is None:
        raise ProtocolError("a hello for a link carries the node's statement")
    alive = alive_from_wire(hello.statement.get("alive"))
    if alive.node != hello.node:
        raise ProtocolError("a hello carries another node's statement")
    return alive

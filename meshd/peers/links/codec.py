"""Gossip as JSON: messages to frames and back. Pure.

A peer's bytes become a message only if every field has its type and every number, string and list
is within its bounds; anything else is a ProtocolError and ends the link. Short keys: these frames
are most of what idle nodes send.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, Final, assert_never

from meshd.config import is_address
from meshd.errors import ProtocolError
from meshd.ids import NodeId
from meshd.peers.swim.gossip import (
    Ack,
    Alive,
    Dead,
    Digest,
    Gossip,
    Message,
    Nack,
    Ping,
    PingReq,
    Suspect,
    Sync,
    Update,
)

NODE_ID_LENGTH: Final = 52
MAX_COUNTER: Final = 1 << 53
"""Sequence numbers, incarnations and versions; JSON numbers are exact up to there."""
MAX_HASH: Final = 1 << 64
MAX_UPDATES: Final = 64
MAX_BUCKETS: Final = 64
MAX_ADDRESSES: Final = 4
MAX_ADDRESS_LENGTH: Final = 262
SIGNATURE_BYTES: Final = 64

_NODE_ID_ALPHABET: Final = frozenset("abcdefghijklmnopqrstuvwxyz234567")


def message_to_wire(message: Message) -> dict[str, Any]:
    """The JSON object of a gossip message; `t` says which."""
    match message:
        case Ping() | Ack() | Nack():
            kind = type(message).__name__.lower()
            return {"t": kind, "n": message.seq, "u": _updates_out(message.updates)}
        case PingReq():
            updates = _updates_out(message.updates)
            return {"t": "pingreq", "n": message.seq, "to": message.target, "u": updates}
        case Gossip():
            return {"t": "gossip", "u": _updates_out(message.updates)}
        case Digest():
            return {"t": "digest", "b": list(message.buckets), "a": message.answer}
        case Sync():
            updates = _updates_out(message.updates)
            return {"t": "sync", "b": list(message.buckets), "u": updates, "a": message.answer}
        case _:
            assert_never(message)


def message_from_wire(frame: dict[str, Any]) -> Message | None:
    """The gossip message in a frame; None if it is a frame of another kind.

    Raises ProtocolError.
    """
    read = _READERS.get(str(frame.get("t")))
    return None if read is None else read(frame)


def alive_to_wire(alive: Alive) -> list[Any]:
    signature = base64.b64encode(alive.signature).decode()
    left = 1 if alive.left else 0
    return ["a", alive.node, alive.incarnation, alive.version, [*alive.addresses], left, signature]


def alive_from_wire(value: Any) -> Alive:
    """A statement of a node, its signature not yet checked. Raises ProtocolError."""
    update = _update_in(value)
    if not isinstance(update, Alive):
        raise ProtocolError("a statement of a living node was expected")
    return update


def node_id_from_wire(value: Any) -> NodeId:
    if type(value) is str and len(value) == NODE_ID_LENGTH and _NODE_ID_ALPHABET.issuperset(value):
        return NodeId(value)
    raise ProtocolError("a node id is 52 characters of base32")


# -- updates --------------------------------------------------------------------------------------


def _updates_out(updates: tuple[Update, ...]) -> list[list[Any]]:
    return [_update_out(update) for update in updates]


def _update_out(update: Update) -> list[Any]:
    match update:
        case Alive():
            return alive_to_wire(update)
        case Suspect():
            return ["s", update.node, update.incarnation, update.by]
        case Dead():
            return ["d", update.node, update.incarnation, update.by]
        case _:
            assert_never(update)


def _updates_in(frame: dict[str, Any]) -> tuple[Update, ...]:
    return tuple(_update_in(value) for value in _list(frame.get("u"), MAX_UPDATES, "updates"))


def _update_in(value: Any) -> Update:
    if type(value) is not list or not value:
        raise ProtocolError("an update is a list")
    match value:
        case ["a", node, incarnation, version, addresses, left, signature]:
            return Alive(
                node_id_from_wire(node),
                _number(incarnation, MAX_COUNTER),
                _number(version, MAX_COUNTER),
                tuple(_address(a) for a in _list(addresses, MAX_ADDRESSES, "addresses")),
                bool(_number(left, 2)),
                _signature(signature),
            )
        case ["s", node, incarnation, by]:
            return Suspect(
                node_id_from_wire(node), _number(incarnation, MAX_COUNTER), node_id_from_wire(by)
            )
        case ["d", node, incarnation, by]:
            return Dead(
                node_id_from_wire(node), _number(incarnation, MAX_COUNTER), node_id_from_wire(by)
            )
    raise ProtocolError("an update of an unknown kind")


# -- messages -------------------------------------------------------------------------------------


def _ping(frame: dict[str, Any]) -> Message:
    return Ping(_number(frame.get("n"), MAX_COUNTER), _updates_in(frame))


def _ack(frame: dict[str, Any]) -> Message:
    return Ack(_number(frame.get("n"), MAX_COUNTER), _updates_in(frame))


def _nack(frame: dict[str, Any]) -> Message:
    return Nack(_number(frame.get("n"), MAX_COUNTER), _updates_in(frame))


def _pingreq(frame: dict[str, Any]) -> Message:
    target = node_id_from_wire(frame.get("to"))
    return PingReq(_number(frame.get("n"), MAX_COUNTER), target, _updates_in(frame))


def _gossip(frame: dict[str, Any]) -> Message:
    return Gossip(_updates_in(frame))


def _digest(frame: dict[str, Any]) -> Message:
    hashes = _list(frame.get("b"), MAX_BUCKETS, "buckets")
    return Digest(tuple(_number(h, MAX_HASH) for h in hashes), frame.get("a") is True)


def _sync(frame: dict[str, Any]) -> Message:
    buckets = _list(frame.get("b"), MAX_BUCKETS, "buckets")
    numbers = tuple(_number(b, MAX_BUCKETS) for b in buckets)
    return Sync(numbers, _updates_in(frame), frame.get("a") is True)


_READERS: Final[dict[str, Callable[[dict[str, Any]], Message]]] = {
    "ping": _ping,
    "ack": _ack,
    "nack": _nack,
    "pingreq": _pingreq,
    "gossip": _gossip,
    "digest": _digest,
    "sync": _sync,
}

# -- fields ---------------------------------------------------------------------------------------


def _number(value: Any, below: int) -> int:
    if type(value) is int and 0 <= value < below:
        return value
    raise ProtocolError(f"a whole number from 0 to {below - 1} was expected")


def _list(value: Any, most: int, what: str) -> list[Any]:
    if type(value) is list and len(value) <= most:
        return value
    raise ProtocolError(f"{what}: a list of at most {most} was expected")


def _address(value: Any) -> str:
    short = type(value) is str and len(value) <= MAX_ADDRESS_LENGTH and value.isascii()
    if short and is_address(value):
        return str(value)
    raise ProtocolError("an address is HOST:PORT")


def _signature(value: Any) -> bytes:
    if type(value) is str and len(value) <= 2 * SIGNATURE_BYTES:
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) == SIGNATURE_BYTES:
            return raw
    raise ProtocolError(f"a signature is {SIGNATURE_BYTES} bytes in base64")

"""What nodes tell each other about nodes: statements, messages, events and orders of the machine.

Pure data. A statement about a living or leaving node is that node's own, signed; suspicions and
deaths are said by others and can be refuted only by a newer statement of the node itself. The
membership machine never sees a signature it would have to check: whoever posts to it has checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.view import PeerState

# -- statements -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alive:
    """A node's own word that it lives (or, with `left`, that it goes for now and knows it).

    `incarnation`: (starts of the node << 20) + refutations of this run; only the node raises it.
    `version` counts its adverts within all incarnations; a higher one is newer.
    """

    node: NodeId
    incarnation: int
    version: int
    addresses: tuple[str, ...]
    """HOST:PORT, most promising first; at most 4."""
    left: bool
    signature: bytes
    """Ed25519 over the canonical bytes of all of the above and the mesh id (credentials room)."""


@dataclass(frozen=True, slots=True)
class Suspect:
    node: NodeId
    incarnation: int
    by: NodeId


@dataclass(frozen=True, slots=True)
class Dead:
    """A tombstone: lasts until the node states a higher incarnation, or is forgotten with age."""

    node: NodeId
    incarnation: int
    by: NodeId


Update: TypeAlias = Alive | Suspect | Dead


def encoded_size(update: Update) -> int:
    """About how many bytes it takes in a frame, keys and quotes included; what budgets count in."""
    match update:
        case Alive():
            addresses = sum(len(address) + 3 for address in update.addresses)
            signature = 4 * len(update.signature) // 3
            return len(update.node) + addresses + signature + 64
        case Suspect() | Dead():
            return len(update.node) + len(update.by) + 48


# -- messages -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping:
    seq: int
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """Answers the Ping of that `seq`; also relayed back for a PingReq."""

    seq: int
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class PingReq:
    """Please ping `target` for me and send me an Ack (or a Nack) of this `seq`."""

    seq: int
    target: NodeId
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Nack:
    """The target of a PingReq did not answer me either; you and I are well (Lifeguard)."""

    seq: int
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Gossip:
    """Updates that did not wait for a probe to ride on."""

    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Digest:
    """Anti-entropy: one 64-bit hash per bucket of node ids over (node, incarnation, version) of
    the members that live. `answer`: whether buckets that differ should be sent back as Sync."""

    buckets: tuple[int, ...]
    answer: bool


@dataclass(frozen=True, slots=True)
class Sync:
    """Everything the sender knows in the buckets named; several if it does not fit into one.

    A Dead in it is a lead and not news: the receiver probes a node that it holds alive.
    """

    buckets: tuple[int, ...]
    updates: tuple[Update, ...]
    answer: bool
    """Whether the receiver should send what it knows of these buckets in return."""


Message: TypeAlias = Ping | Ack | PingReq | Nack | Gossip | Digest | Sync

# -- events of the membership machine -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessageReceived:
    sender: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class NodeMet:
    """A link to `statement.node` came up and this is what it said of itself: proof of life."""

    statement: Alive


@dataclass(frozen=True, slots=True)
class LinkLost:
    """An established link broke (reset, end of file) without a goodbye: evidence at once."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class DialRefused:
    """The node's machine answered that nobody listens there: stronger evidence than silence."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class SelfStated:
    """Our own statement, newly signed, in answer to a `StateSelf` or because the advert changed."""

    statement: Alive


@dataclass(frozen=True, slots=True)
class NodeRevoked:
    """On the deny list: forget it and believe no statement about it any more."""

    node: NodeId


Event: TypeAlias = (
    MessageReceived | NodeMet | LinkLost | DialRefused | SelfStated | NodeRevoked | Tick
)

# -- orders of the membership machine -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """To `to` over its link, dialling one if there is none. May be lost; nobody is told."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class StateSelf:
    """Sign a statement of ourselves with at least this incarnation and post it as SelfStated."""

    incarnation: int


class Why(StrEnum):
    """Reason of a change of state, for logs and `meshd peers`."""

    MET = "met"
    TOLD = "told"
    REFUTED = "refuted"
    NO_ANSWER = "no answer"
    LINK_LOST = "link lost"
    REFUSED = "connection refused"
    LEFT = "left"
    FORGOTTEN = "forgotten"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """`old` None: was not known. `new` None: no longer kept (tombstone aged out, or revoked)."""

    node: NodeId
    old: PeerState | None
    new: PeerState | None
    why: Why
    by: NodeId | None = None
    """Who said so, if it was not seen here."""


@dataclass(frozen=True, slots=True)
class AdvertNewer:
    """`source` has (or is) a node whose advert is newer than the last version told here."""

    node: NodeId
    version: int
    source: NodeId


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A direct probe was answered after `seconds`."""

    node: NodeId
    seconds: float


@dataclass(frozen=True, slots=True)
class SelfImpersonated:
    """Somebody holds our key: `statement` is newer than all we said, and we did not make it. It
    is being refuted; the shell finds out whether the data directory was copied."""

    statement: Alive


Effect: TypeAlias = Send | StateSelf | MemberChanged | AdvertNewer | RoundTrip | SelfImpersonated

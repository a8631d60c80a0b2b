"""The protocol between nodes: its versions, and what one port can be asked for.

Pure. A node speaks a range of versions; two nodes use the highest both speak. The range, and the
words of a refusal, are the part of the protocol that never changes.
"""

from __future__ import annotations

from typing import Final, TypeAlias

Range: TypeAlias = tuple[int, int]
"""Lowest and highest version, both included."""

PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
PROTOCOL: Final[Range] = (PROTOCOL_MIN, PROTOCOL_MAX)

ALPN_JOIN: Final = "meshd-join/1"
"""Admission of a new node; the only one open to a client without a certificate."""
ALPN_CTL: Final = "meshd-ctl/1"
"""One long-lived link a pair of nodes: gossip, adverts, control calls."""
ALPN_RAW: Final = "meshd-raw/1"
"""One stream of bytes to a named service."""
ALPN_BULK: Final = "meshd-bulk/1"
"""One stream of many bytes; spoken by a carrier process, which gets the connection before TLS."""
ALPNS: Final = (ALPN_JOIN, ALPN_CTL, ALPN_RAW)
"""What the daemon itself speaks."""


def common_version(ours: Range, theirs: Range) -> int | None:
    """The highest version both speak; None if there is none."""
    highest = min(ours[1], theirs[1])
    return highest if highest >= max(ours[0], theirs[0]) else None


def skew_message(
    ours: Range, theirs: Range, *, our_name: str, our_build: str, their_name: str, their_build: str
) -> str:
    """One line, the same for a reader on either side, that says which of two nodes to upgrade.

    `*_build`: the version of meshd. For ranges without a common version; the node with the lower
    range is the old one.
    """
    old, new = (our_name, their_name) if ours[1] < theirs[0] else (their_name, our_name)
    return (
        f"{our_name} speaks protocol {_words(ours)} (meshd {our_build}) and {their_name} "
        f"{_words(theirs)} (meshd {their_build}); upgrade meshd on {old} to the version of {new}"
    )


def _words(versions: Range) -> str:
    low, high = versions
    return str(low) if low == high else f"{low} to {high}"

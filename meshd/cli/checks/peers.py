"""Checks of the mesh: whether this node is in it, and whether the others can be reached."""

from __future__ import annotations

import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from meshd.cli.checks.subject import Subject
from meshd.config import split_address
from meshd.kernel.findings import Fault, NotApplicable

ASKED = 64
"""Nodes that are connected to, at most."""
AT_ONCE = 16


def mesh(subject: Subject) -> str:
    known = subject.running()["mesh"]
    state = known.get("state", "member")
    if state == "none":
        raise NotApplicable(known.get("reason") or "in none")
    if state != "member":
        raise Fault(
            f"{known['name']}: {state}, {known.get('reason') or 'no reason is known'}",
            "see `meshd status`; `meshd doctor --peer HOST:PORT` looks at the way to a member",
        )
    return f"{known['name']}, {known['alive']} of {known['members']} nodes alive"


def others(subject: Subject) -> str:
    """A connection to every node that is said to be alive or suspect: its port takes it.

    Dead ones are no fault of this node; how many there are is said.
    """
    known = subject.running()["peers"]
    present = [peer for peer in known if peer["state"] in ("alive", "suspect")]
    if not present:
        raise NotApplicable("no other node is there")
    asked = [peer for peer in present if peer["address"]][:ASKED]
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="doctor") as pool:
        answers = pool.map(lambda peer: _problem(peer, subject.around.answer_s), asked)
        problems = {peer["address"]: words for peer, words in zip(asked, answers, strict=True)}
    counts = Counter(peer["state"] for peer in known)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    for address, words in problems.items():
        if words is not None:
            raise Fault(
                f"{told}: {'; '.join(filter(None, problems.values()))}",
                f"`meshd doctor --peer {address}` names the first step that fails on the way",
            )
    trips = [peer["rtt_ms"] for peer in present if peer["rtt_ms"] is not None]
    farthest = f", the farthest {max(trips):.1f} ms away" if trips else ""
    return f"{told}; {len(asked)} take connections{farthest}"


def _problem(peer: dict[str, Any], limit_s: float) -> str | None:
    """Why it cannot be connected to; None if it can, and nobody doubts it."""
    try:
        socket.create_connection(split_address(peer["address"]), timeout=limit_s).close()
    except OSError as error:
        return f"{peer['name']} at {peer['address']} does not answer: {error}"
    if peer["state"] == "suspect":
        return f"{peer['name']} takes connections but missed its last probes"
    return None

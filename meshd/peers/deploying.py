"""Deployments on the wire: what is written at one node is soon at every node.

1. Who writes a record, or is told one that is newer than its own, sends it to all its links but the
   one it came by. What is not newer goes no further: so a flood ends.
2. What is lost on the way is found by digests, on every new link and every `DIGEST_EVERY_S` on one
   of the links. Of two nodes whose digests differ each sends all it has, in an order drawn anew:
   of what a slow link had no room for, other parts come through the next time.
3. A member's record is believed, whoever it says wrote it: to write one is to be a member. What a
   client node sends is dropped. How many records are kept is for the table to bound.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

from meshd.errors import ProtocolError
from meshd.kernel import Clock
from meshd.peers.links.links import ControlLink, LinkTable
from meshd.peers.placement import MAX_RECORDS, record_to_wire, records_from_wire
from meshd.peers.swim.throttle import Throttle
from meshd.view import Deployment, Role

DIGEST_EVERY_S: Final = 5.0
ANSWER_GAP_S: Final = 1.0
"""Least time between two answers with the whole table to one node."""
MAX_DIGEST_CHARS: Final = 64
MAX_ANSWERED: Final = 4096


class Deployments(Protocol):
    """The table of one node, used on the loop: nothing here may block."""

    def digest(self) -> str:
        """Equal for equal tables, tombstones included; at most MAX_DIGEST_CHARS."""

    def records(self) -> Iterable[Deployment]: ...

    def merge(self, records: Iterable[Deployment]) -> Sequence[Deployment]:
        """Those of them that were newer than what the table held, and that it holds now."""


class Deploying:
    """Of one session. `table` None: such frames are ignored."""

    def __init__(
        self,
        table: Deployments | None,
        links: LinkTable,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._table = table
        self._links = links
        self._clock = clock
        self._rng = rng
        self._answers = Throttle(ANSWER_GAP_S, MAX_ANSWERED)
        self._digest_at = clock.now() + DIGEST_EVERY_S * rng.random()

    def spread(self, records: Sequence[Deployment], source: ControlLink | None = None) -> None:
        """They are news to this node: tell its links (1)."""
        frames = list(_frames(records))
        for link in self._links:
            if link is not source:
                for frame in frames:
                    link.send(frame, droppable=True)

    def greet(self, link: ControlLink) -> None:
        """What a new link is told at once (2); the other side does the same."""
        if self._table is not None:
            link.send(_digest(self._table, answer=False))

    def look(self) -> None:
        """Called every second or so: compare with some other node now and then (2)."""
        now, links = self._clock.now(), list(self._links)
        if self._table is not None and links and now >= self._digest_at:
            self._digest_at = now + DIGEST_EVERY_S
            self._rng.choice(links).send(_digest(self._table, answer=True), droppable=True)

    def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> bool:
        """Whether the frame was one of ours. Raises ProtocolError."""
        match frame.get("t"):
            case "deploy":
                self._records_came(link, frame.get("entries"))
            case "deployed":
                self._digest_came(link, frame)
            case _:
                return False
        return True

    def _records_came(self, link: ControlLink, entries: Any) -> None:
        records = records_from_wire(entries)
        if self._table is None or link.remote.role is Role.CLIENT:  # 3
            return
        news = self._table.merge(records)
        if news:
            self.spread(news, source=link)

    def _digest_came(self, link: ControlLink, frame: dict[str, Any]) -> None:
        theirs, answer = frame.get("digest"), frame.get("answer")
        if type(theirs) is not str or len(theirs) > MAX_DIGEST_CHARS or type(answer) is not bool:
            raise ProtocolError("a digest of deployments is malformed")
        table = self._table
        if table is None or theirs == table.digest():
            return
        if not self._answers.try_pass(link.remote.node, self._clock.now()):
            return
        records = list(table.records())
        self._rng.shuffle(records)
        for part in _frames(records):
            link.send(part, droppable=True)
        if answer:
            link.send(_digest(table, answer=False), droppable=True)


def _digest(table: Deployments, *, answer: bool) -> dict[str, Any]:
    """`answer`: tell me yours too if it is another one."""
    return {"t": "deployed", "digest": table.digest(), "answer": answer}


def _frames(records: Sequence[Deployment]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(records), MAX_RECORDS):
        chunk = records[start : start + MAX_RECORDS]
        yield {"t": "deploy", "entries": [record_to_wire(record) for record in chunk]}

"""Deployments on the wire: what is written at one node is soon at every node.

1. Who writes a record, or is told one that is newer than its own, sends it to all its links but the
   one it came by. What is not newer goes no further: so a flood ends.
2. What is lost on the way is found by digests, on every new link and every `DIGEST_EVERY_S` on one
   of the links. Who is told another digest than its own sends the stamps of its records; the other
   side answers with the records that are newer or missing there, and asks for those it lacks.
   Whatever a slow link has no room for is left out, in an order drawn anew each time.
3. A member's record is believed, whoever it says wrote it: to write one is to be a member. What a
   client node sends is dropped. How many records are kept is for the table to bound.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, Protocol

from meshd.errors import ProtocolError
from meshd.ids import ModelId
from meshd.kernel import Clock
from meshd.peers.links.links import ControlLink, LinkTable
from meshd.peers.swim.throttle import Throttle
from meshd.view import Role

MAX_ENTRIES: Final = 24
"""Records in one frame: at most 200 KiB of the longest there may be, usually 5."""
MAX_LACKING: Final = 128
"""Names in one frame; those are at most 256 characters long."""
MAX_NAME_CHARS: Final = 256
MAX_DIGEST_CHARS: Final = 64
DIGEST_EVERY_S: Final = 5.0
STAMPS_GAP_S: Final = 1.0
"""Least time between two answers with all stamps to one node."""
MAX_ANSWERED: Final = 4096


class Deployments(Protocol):
    """The table of one node, used on the loop: nothing here may block. What travels is JSON that
    only the table makes and reads."""

    @property
    def digest(self) -> str:
        """Equal for equal tables, tombstones included; at most MAX_DIGEST_CHARS."""

    def stamps(self) -> Sequence[dict[str, Any]]:
        """What versions it has, in chunks of at most 16 KiB each."""

    def compare(self, stamps: object) -> tuple[Sequence[ModelId], Sequence[ModelId]] | None:
        """With a chunk of another table: (what that one lacks, what this one lacks). None for what
        is no chunk."""

    def entries(self, models: Iterable[ModelId]) -> Sequence[dict[str, Any]]:
        """The records of those of them that it knows, each of at most 8 KiB."""

    def merge(self, entries: Iterable[object]) -> Sequence[ModelId]:
        """The models whose record changed by it. What is no record is left out."""


class Deploying:
    """Of one session. `table` None: such frames are ignored."""

    def __init__(
        self, table: Deployments | None, links: LinkTable, clock: Clock, rng: random.Random
    ) -> None:
        self._table = table
        self._links = links
        self._clock = clock
        self._rng = rng
        self._stamps = Throttle(STAMPS_GAP_S, MAX_ANSWERED)
        self._digest_at = clock.now() + DIGEST_EVERY_S * rng.random()

    def spread(self, models: Collection[ModelId], source: ControlLink | None = None) -> None:
        """Their records are news to this node: tell its links (1)."""
        if self._table is not None:
            entries = list(self._table.entries(models))
            for link in self._links:
                if link is not source:
                    self._send(link, entries)

    def greet(self, link: ControlLink) -> None:
        """Compare with a node that was linked up to (2); the dialler begins."""
        if self._table is not None and link.remote.dialled:
            link.send(_digest(self._table))

    def look(self) -> None:
        """Called every second or so: compare with some other node now and then (2)."""
        now, links = self._clock.now(), list(self._links)
        if self._table is not None and links and now >= self._digest_at:
            self._digest_at = now + DIGEST_EVERY_S
            self._rng.choice(links).send(_digest(self._table), droppable=True)

    def frame_came(self, link: ControlLink, frame: dict[str, Any]) -> bool:
        """Whether the frame was one of ours. Raises ProtocolError."""
        kind = frame.get("t")
        if kind not in ("deploy", "deployed", "stamps", "lacking"):
            return False
        if self._table is None:
            return True
        match kind:
            case "deploy":
                self._records_came(self._table, link, frame.get("entries"))
            case "deployed":
                self._digest_came(self._table, link, frame.get("digest"))
            case "stamps":
                self._stamps_came(self._table, link, frame.get("of"))
            case _:
                self._was_asked(self._table, link, frame.get("models"))
        return True

    def _records_came(self, table: Deployments, link: ControlLink, entries: Any) -> None:
        if type(entries) is not list or len(entries) > MAX_ENTRIES:
            raise ProtocolError(f"deployments come in lists of at most {MAX_ENTRIES}")
        if link.remote.role is not Role.CLIENT:  # 3
            news = table.merge(entries)
            if news:
                self.spread(news, source=link)

    def _digest_came(self, table: Deployments, link: ControlLink, digest: Any) -> None:
        if type(digest) is not str or len(digest) > MAX_DIGEST_CHARS:
            raise ProtocolError("a digest of deployments is malformed")
        if digest == table.digest:
            return
        if self._stamps.try_pass(link.remote.node, self._clock.now()):
            chunks = list(table.stamps())
            self._rng.shuffle(chunks)
            for chunk in chunks:
                link.send({"t": "stamps", "of": chunk}, droppable=True)

    def _stamps_came(self, table: Deployments, link: ControlLink, chunk: Any) -> None:
        difference = table.compare(chunk)
        if difference is None:
            raise ProtocolError("stamps of deployments are malformed")
        theirs, ours = difference
        self._send(link, list(table.entries(theirs)))
        for start in range(0, len(ours), MAX_LACKING):
            wanted = list(ours[start : start + MAX_LACKING])
            link.send({"t": "lacking", "models": wanted}, droppable=True)

    def _was_asked(self, table: Deployments, link: ControlLink, models: Any) -> None:
        if type(models) is not list or len(models) > MAX_LACKING or not all(map(_is_name, models)):
            raise ProtocolError(f"deployments are asked for by at most {MAX_LACKING} names")
        self._send(link, list(table.entries(dict.fromkeys(models))))

    def _send(self, link: ControlLink, entries: list[dict[str, Any]]) -> None:
        self._rng.shuffle(entries)
        for start in range(0, len(entries), MAX_ENTRIES):
            part = entries[start : start + MAX_ENTRIES]
            link.send({"t": "deploy", "entries": part}, droppable=True)


def _digest(table: Deployments) -> dict[str, Any]:
    return {"t": "deployed", "digest": table.digest}


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_NAME_CHARS

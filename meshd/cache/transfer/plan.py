"""One file on its way: which chunks are there, who brings the rest, whom to believe. Pure.

Sources are the hub and peers; `BEFORE` stands for what an earlier fetch or another program left.
The rules, by the numbers that stand in the code:

1. A chunk that is not what its own source's list of hashes promises bans that source.
2. Chunks are held against the believed list (`jury`): own hashes of this machine, else the list
   most peers agree on.
3. A peer's chunk that differs from it is not taken. If the peer promised just that, it dissents
   and waits until its list is believed; if it promised nothing, it is banned.
4. The hub's chunk that differs from it is brought once more, by the hub if it can. The same again:
   the believed list lies. Something else each time, `MAX_ACCOUNTS` times: the hub is left.
5. Who gave a list that lies is banned, and what they brought is wanted again; when a list comes to
   be believed, chunks that are there and differ from it are wanted again.
6. The sha256 of the whole file decides. If it is wrong, the first of these that applies: chunks
   that are on disk otherwise than they came are wanted again, a few times; a believed list is
   discredited (5) and what did not come from the hub is wanted again; peers that brought anything
   are banned and what did not come from the hub is wanted again; once, everything is wanted again.
   Then the file has failed.
7. Peers go first. The hub is asked when all of them have said what they have, or `HEAD_START_S`
   after the start; when so little is missing that a peer brings it at once, `MENDING_S` after it.
8. When no source can bring what is missing, a dissenter's list is believed if there is one, else
   the file has failed.

Whatever comes, in any order, a plan ends complete or failed: each step back uses up a source, a
list or a count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from meshd.cache.chunks import CHUNK_BYTES, chunk_count
from meshd.cache.transfer.flights import Flights, Span
from meshd.cache.transfer.holdings import Holdings
from meshd.cache.transfer.jury import Jury
from meshd.cache.transfer.roster import Roster

HUB: Final = "hub"
BEFORE: Final = ""
HEAD_START_S: Final = 1.0
MENDING_S: Final = 3.0
HUB_SPAN: Final = 64 * 1024 * 1024 // CHUNK_BYTES
"""Chunks the hub is asked for at once: a request costs it more than a peer."""
PEER_SPAN: Final = 4
MAX_ACCOUNTS: Final = 3
MAX_TORN: Final = 3


class Decision(StrEnum):
    """What to do with a chunk that came."""

    STORE = "store"
    """Write it, then say `stored`."""
    DISCARD = "discard"
    BANNED = "banned"
    """Leave its source."""


class Plan:
    def __init__(
        self,
        size: int,
        sources: Iterable[str],
        *,
        streams: int = 1,
        own: bytes | None = None,
        there: Mapping[int, bytes] | None = None,
        lot: int = 0,
    ) -> None:
        """`own`: hashes of chunks by an earlier verification on this machine. `there`: chunks that
        lie on disk, and the hash they had when they came. `lot`: any number; when some peers are
        on their way to the same file, the hub is asked from there on, so that all have something
        to give."""
        self.chunks = chunk_count(size)
        self._holdings = Holdings(size)
        self._roster = Roster(self.chunks, sources)
        self._jury = Jury(self.chunks, own)
        self._flights = Flights(self.chunks, streams)
        self._lot = lot % self.chunks
        self._hub_start = 0
        self._begun_at: float | None = None
        """When work was first asked for."""
        self._accounts: dict[int, list[bytes]] = {}
        """Chunks about which the hub and the believed list differ: what the hub said (rule 4)."""
        self._torn = 0
        self._anew = False
        self.failure: str | None = None
        for index, digest in (there or {}).items():
            self._take(index, BEFORE, digest)
        self._recheck()
        self._is_little = self.missing_bytes <= PEER_SPAN * CHUNK_BYTES

    # -- what is known ------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Every chunk is on disk; the hash of the whole may still say no."""
        return self._holdings.complete

    def has(self, index: int) -> bool:
        return index in self._holdings

    def digest(self, index: int) -> bytes:
        """The hash the chunk had when it came."""
        return self._holdings.digest(index)

    def came_before(self, index: int) -> bool:
        """Whether it was on disk already."""
        return self._holdings.brought_by(index) == BEFORE

    @property
    def missing_bytes(self) -> int:
        return self._holdings.missing_bytes

    def usable(self, source: str) -> bool:
        """Whether `source` may still bring something, now or later."""
        return self.failure is None and not self._roster.is_out(source)

    def is_new(self, source: str) -> bool:
        """Whether `source` has still to say what it has."""
        return self.failure is None and self._roster.is_new(source)

    @property
    def storing(self) -> bool:
        """Some chunk is being written."""
        return self._holdings.storing

    def why_out(self) -> dict[str, str]:
        """Sources that bring nothing more, and why."""
        return self._roster.why_out()

    def take_dropped(self) -> tuple[int, ...]:
        """Chunks that were there and no longer count, since the last call."""
        return self._holdings.take_dropped()

    # -- sources ------------------------------------------------------------------------------

    def offered(self, source: str, has: bytes | None, hashes: bytes | None) -> None:
        """`source` says what it has, one bit a chunk (None: all), and what its chunks hash to."""
        self._roster.offered(source, has)
        if has is not None:
            self._hub_start = self._lot
        if hashes is None or self._roster.is_banned(source):
            return
        before = self._jury.believed
        if not self._jury.hear(source, hashes):
            self._ban(source, "promises bytes that were shown to be wrong")
        elif self._jury.believed != before:
            self._recheck()

    def lacks(self, source: str, span: Span) -> None:
        """It could not give what it said it has."""
        self._roster.lacks(source, span)

    def gone(self, source: str, reason: str) -> None:
        """`source` brings nothing more."""
        self._roster.gone(source, reason)

    # -- spans --------------------------------------------------------------------------------

    def next(self, source: str, now: float) -> Span | None:
        """What `source` should bring now; None if nobody needs to bring what it has."""
        if self._begun_at is None:
            self._begun_at = now
        hub = source == HUB
        if not self._may_bring(source) or (hub and now < self._hub_from(self._begun_at)):
            return None
        return self._flights.next(
            source,
            self._allowed(source),
            HUB_SPAN if hub else PEER_SPAN,
            self._hub_start if hub else 0,
            now,
        )

    def share(self, source: str, now: float) -> Span | None:
        """What an idle `source` should take off, or bring besides, somebody slower."""
        if not self._may_bring(source):
            return None
        return self._flights.share(source, self._allowed(source), now)

    def covers(self, token: int, index: int) -> bool:
        """Whether the holder of the span should go on to chunk `index`."""
        return self._flights.covers(token, index) and self.failure is None

    def finished(self, token: int) -> None:
        """The span came to its end, whether all of it came or not."""
        rest = self._flights.end(token)
        self._flights.want(i for i in rest if self._holdings.is_missing(i))

    def arrived(self, token: int, index: int, digest: bytes, now: float) -> Decision:
        """A chunk of the span came, and hashes to `digest`."""
        source = self._flights.source_of(token)
        self._flights.arrived(token, index, now)
        if self._roster.is_banned(source):
            self._want_again(index)
            return Decision.BANNED
        if not self._holdings.is_missing(index) or self.failure is not None:
            return Decision.DISCARD
        decision = self._judge(source, index, digest)
        if decision is Decision.STORE:
            self._holdings.begin_storing(index, source, digest)
            self._flights.got((index,))
        else:
            self._want_again(index)
        return decision

    def stored(self, index: int) -> None:
        """A chunk that was to be stored is on disk. It counts unless its source fell meanwhile."""
        source, digest = self._holdings.end_storing(index)
        self._take(index, source, digest)
        expected = self._jury.expected(index)
        if self._roster.is_banned(source) or (expected is not None and expected != digest):
            self._drop(index)

    def not_stored(self, index: int) -> None:
        """Writing it failed."""
        self._holdings.end_storing(index)
        self._want_again(index)

    # -- the end ------------------------------------------------------------------------------

    def whole_failed(self, torn: Iterable[int]) -> bool:
        """The file is complete and its sha256 is wrong. `torn`: chunks that no longer hash to what
        they did when they came. Whether all of it starts anew (rule 6)."""
        if self.torn(torn):
            return False
        if self._jury.believed is not None:
            self._overthrow()
        else:
            for name in {by for _, by, _ in self._holdings if by not in (HUB, BEFORE)}:
                self._ban(name, "brought chunks of a file whose sha256 was wrong")
        for index, by, _ in self._holdings:
            if by != HUB:
                self._drop(index)
        if not self.complete:
            return False
        if self._anew:
            self.failure = (
                "all of it was fetched twice, and its sha256 is not the one it should have"
            )
            return False
        self._anew = True
        for index in range(self.chunks):
            self._drop(index)
        return True

    def torn(self, indices: Iterable[int]) -> bool:
        """These are on disk otherwise than they came. False if there are none."""
        lost = [index for index in indices if index in self._holdings]
        if not lost:
            return False
        if any(self._holdings.brought_by(index) != BEFORE for index in lost):
            self._torn += 1
        if self._torn > MAX_TORN:
            self.failure = "the disk does not keep what is written to it"
        for index in lost:
            self._drop(index)
        return True

    def abandon(self) -> None:
        """Nobody wants the file any more: no further chunk is to be stored."""
        self.failure = self.failure or "given up"

    def settle(self) -> str | None:
        """Whether anything is left to wait for: None, or why the file has failed (rule 7). A peer
        that has only parts may come to have more; it is for its reader to say `gone`."""
        if self.failure or self.complete or self._flights.under_way or self.storing:
            return self.failure
        while not any(self._may_bring(name) or self.is_new(name) for name in self._roster):
            if not any(self._waits(name) for name in self._roster):
                self.failure = "nobody can bring what is missing"
                return self.failure
            self._jury.discredit()
            self._recheck()
        return None

    # -- rules --------------------------------------------------------------------------------

    def _judge(self, source: str, index: int, digest: bytes) -> Decision:
        promised = self._jury.promised(source, index)
        if promised is not None and promised != digest:  # 1
            self._ban(source, "sent other bytes than its own hashes promise")
            return Decision.BANNED
        expected = self._jury.expected(index)
        if expected is None or expected == digest:  # 2
            return Decision.STORE
        if source == HUB:
            return self._hear_hub(index, digest)
        if promised is None:  # 3
            self._ban(source, "sent other bytes than the hashes of others promise")
            return Decision.BANNED
        return Decision.DISCARD

    def _hear_hub(self, index: int, digest: bytes) -> Decision:
        accounts = self._accounts.setdefault(index, [])
        if digest in accounts:  # 4
            self._overthrow()
            expected = self._jury.expected(index)
            if expected is None or expected == digest:
                return Decision.STORE
            return Decision.DISCARD
        accounts.append(digest)
        if len(accounts) >= MAX_ACCOUNTS:
            self.gone(HUB, "sends something else each time it is asked for the same bytes")
        return Decision.DISCARD

    def _overthrow(self) -> None:
        """The believed list lies (rule 5)."""
        for name in self._jury.discredit():
            self._ban(name, "promised bytes that the file does not consist of")
        for index, by, _ in self._holdings:
            if by not in (HUB, BEFORE) and self._roster.is_banned(by):
                self._drop(index)
        self._recheck()

    def _recheck(self) -> None:
        """Hold what is there against a list that came to be believed (rules 4 and 5)."""
        for index, by, digest in self._holdings:
            expected = self._jury.expected(index)
            if expected is None or expected == digest:
                continue
            if by == HUB:
                self._accounts.setdefault(index, []).append(digest)
            self._drop(index)

    def _ban(self, source: str, reason: str) -> None:
        self._roster.ban(source, reason)
        before = self._jury.believed
        self._jury.dismiss(source)
        if self._jury.believed != before:
            self._recheck()

    # -- chunks -------------------------------------------------------------------------------

    def _take(self, index: int, source: str, digest: bytes) -> None:
        self._holdings.take(index, source, digest)
        self._accounts.pop(index, None)
        self._flights.got((index,))

    def _drop(self, index: int) -> None:
        if self._holdings.drop(index):
            self._flights.want((index,))

    def _want_again(self, index: int) -> None:
        if self._holdings.is_missing(index):
            self._flights.want((index,))

    # -- who may ------------------------------------------------------------------------------

    def _may_bring(self, source: str) -> bool:
        known = source == HUB or not self._roster.is_new(source)
        return known and self.usable(source) and not self._jury.dissents(source)

    def _hub_from(self, begun_at: float) -> float:
        """When the hub may be asked (rule 7)."""
        peers = [name for name in self._roster if name != HUB and self.usable(name)]
        if self._is_little and any(
            self._may_bring(name) and self._roster.has_all(name) for name in peers
        ):
            return begun_at + MENDING_S
        if any(self.is_new(name) for name in peers):
            return begun_at + HEAD_START_S
        return begun_at

    def _waits(self, source: str) -> bool:
        """It has something to bring, and is not believed."""
        return self.usable(source) and self._jury.dissents(source)

    def _allowed(self, source: str) -> bytes | None:
        """1 for each chunk `source` may bring; None for all."""
        disputed = self._accounts if source != HUB and self.usable(HUB) else ()  # 4
        return self._roster.allowed(source, disputed)

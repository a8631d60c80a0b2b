"""The worker's side of loans: memory of this node lent to hosts, one stream each.

A loan lives as long as its stream and no longer. What it is made of (leases, an RPC server, warmed
weights) is the lender's, who is told of every end exactly once:

    asked ──grant──> granted ──commit──> committing ──> serving
      │                 │                    │             │
      └─refused         └──────────── ended: the host says so, falls silent or is gone; it breaks
                                      the rules; a commit fails; the lender takes the memory back
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from enum import StrEnum
from typing import Any, Final, Protocol, assert_never

from meshd.errors import MeshdError, ProtocolError
from meshd.ids import LoanId, NodeId
from meshd.peers.loans.line import Line, Pace
from meshd.peers.loans.words import (
    Ask,
    Beat,
    Commit,
    End,
    Ended,
    Granted,
    Loaded,
    Moved,
    Refused,
    Serving,
    parse_host_word,
)
from meshd.view import Loan, LoanAsk

log = logging.getLogger(__name__)

ASK_S: Final = 5.0
"""From the opening of a stream to the ask."""
COMMIT_S: Final = 15.0
"""From the grant to the commit: a host asks all its workers within 5 s, and then commits."""


class Lender(Protocol):
    """Who has the memory. Methods that are not async return at once."""

    def grant(self, host: NodeId, ask: LoanAsk) -> Loan:
        """Lease what `ask` wants. Raises MeshdError, whose message the host is told."""

    async def commit(self, loan: Loan, moved: Callable[[str], None]) -> int:
        """Make it usable through an RPC server; bytes of its weights that it was warmed with.

        `moved`: what it is at, for people; the host gives a commit up that says nothing for 30 s.
        Cancelled when the loan ends. Raises MeshdError.
        """

    def loaded(self, loan: Loan) -> None:
        """Its host has sent all tensors there are; only while it serves."""

    def renew(self, loan: Loan) -> None:
        """The host is there: it has just been heard."""

    def end(self, loan: Loan, reason: str) -> None:
        """Take it all back. Once for each loan; never while its `commit` runs."""


class LoanDesk:
    """All loans of this node. `spawn`: for the commits; a cancelled one ends its loan."""

    def __init__(
        self,
        lender: Lender,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        pace: Pace | None = None,
    ) -> None:
        self._lender = lender
        self._spawn = spawn
        self._pace = pace or Pace()
        self._lent: set[_Lent] = set()

    def serve(self, host: NodeId, name: str) -> asyncio.Protocol:
        """The protocol of a stream that `host`, called `name`, has opened to ask for a loan."""
        return _Lent(host, name, self._lender, self._spawn, self._lent, self._pace).line

    def end(self, loan: LoanId, reason: str) -> None:
        """The memory is not there any more: tell the host, and end the loan. A no-op if there is
        no such loan."""
        for lent in tuple(self._lent):
            if lent.loan is not None and lent.loan.id == loan:
                lent.end(reason)

    def close(self, reason: str) -> None:
        """End all of them."""
        for lent in tuple(self._lent):
            lent.end(reason)


class _State(StrEnum):
    ASKED = "asked"
    """Or about to be."""
    GRANTED = "granted"
    COMMITTING = "committing"
    SERVING = "serving"
    ENDED = "ended"


class _Lent:
    """One stream: the loan asked for on it, from the ask to its end."""

    def __init__(
        self,
        host: NodeId,
        name: str,
        lender: Lender,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        lent: set[_Lent],
        pace: Pace,
    ) -> None:
        self.line = Line(self._heard, self.end, pace)
        self.loan: Loan | None = None
        self._host = host
        self._name = name
        self._lender = lender
        self._spawn = spawn
        self._lent = lent
        self._state = _State.ASKED
        self._commit: asyncio.Task[None] | None = None
        self._warmed_bytes: int | None = None
        self._reason = "it was given up before it could be used"
        """Why it ends, unless somebody knows better."""
        self._limit: asyncio.TimerHandle | None = None
        self._lent.add(self)
        self._expect("ask", ASK_S)

    def end(self, reason: str) -> None:
        """From this side, or because nothing more comes from the other."""
        self.line.hang_up(Ended(reason=reason))
        self._finish(reason)

    # -- what the host says -----------------------------------------------------------------------

    def _heard(self, frame: Mapping[str, Any]) -> None:
        word = parse_host_word(frame)
        match word:
            case None:
                pass  # of a later version
            case Beat():
                if self.loan is not None:
                    self._lender.renew(self.loan)
            case Ask():
                if self._state is not _State.ASKED:
                    raise ProtocolError("it asked twice")
                self._ask(word)
            case Commit():
                if self._state is not _State.GRANTED or self.loan is None:
                    raise ProtocolError("it committed what was not granted, or twice")
                self._begin(self.loan)
            case Loaded():
                if self._state is not _State.SERVING or self.loan is None:
                    raise ProtocolError("it loaded what is not served")
                self._lender.loaded(self.loan)
            case End():
                self.line.hang_up()
                self._finish(word.reason)
            case _:
                assert_never(word)

    def _ask(self, ask: Ask) -> None:
        try:
            self.loan = self._lender.grant(self._host, ask.to_view())
        except MeshdError as error:
            log.info("refused %s memory for %s: %s", self._name, ask.model, error.message)
            self.line.hang_up(Refused(reason=error.code, message=error.message))
            self._finish(error.message)
            return
        self._state = _State.GRANTED
        self._expect("commit", COMMIT_S)
        size = self.loan.ask.part.bytes
        log.info("granted %s %d bytes for %s", self._name, size, ask.model)
        self.line.say(Granted(loan=self.loan.id))

    # -- commit -----------------------------------------------------------------------------------

    def _begin(self, loan: Loan) -> None:
        self._expect_no_more()
        self._state = _State.COMMITTING
        self._commit = self._spawn(self._carry_out(loan))
        self._commit.add_done_callback(self._carried_out)

    async def _carry_out(self, loan: Loan) -> None:
        try:
            self._warmed_bytes = await self._lender.commit(loan, self._moved)
        except MeshdError as error:
            self._reason = error.message

    def _carried_out(self, _: asyncio.Task[None]) -> None:
        """Whatever came of it: it may have been cancelled before its first step."""
        self._commit = None
        if self._state is _State.ENDED:
            self._give_back()
        elif self._warmed_bytes is None:
            self.end(self._reason)
        else:
            self._state = _State.SERVING
            self.line.say(Serving(warmed_bytes=self._warmed_bytes))

    def _moved(self, words: str) -> None:
        self.line.say(Moved(words=words))

    # -- end --------------------------------------------------------------------------------------

    def _finish(self, reason: str) -> None:
        if self._state is _State.ENDED:
            return
        self._state = _State.ENDED
        self._reason = reason
        self._expect_no_more()
        if self._commit is not None:
            self._commit.cancel()
        else:
            self._give_back()

    def _give_back(self) -> None:
        self._lent.discard(self)
        if self.loan is not None:
            log.info("the loan to %s is over: %s", self._name, self._reason)
            self._lender.end(self.loan, self._reason)

    def _expect(self, word: str, within_s: float) -> None:
        self._expect_no_more()
        reason = f"it sent no `{word}` within {within_s:.0f} s"
        self._limit = asyncio.get_running_loop().call_later(within_s, self.end, reason)

    def _expect_no_more(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

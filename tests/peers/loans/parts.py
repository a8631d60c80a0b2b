"""What the tests of loans share: a lender that keeps a record, and ends of streams without TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from meshd.errors import MeshdError
from meshd.ids import LoanId, ModelId, NodeId
from meshd.peers.links.frames import FrameReader, parse
from meshd.peers.loans.borrowing import BorrowOrder
from meshd.peers.loans.words import FRAME_LIMIT
from meshd.view import Loan, LoanAsk, Part, SplitPlan

A_NODE = NodeId("a" * 51 + "a")


def a_part(node: NodeId = A_NODE, name: str = "w") -> Part:
    memory = (("CUDA0", 3 << 30), ("CUDA1", 1 << 30))
    return Part(node, name, memory, layers=(12, 4), first_layer=0, output=False, share=0.5)


def an_ask(part: Part | None = None) -> LoanAsk:
    return LoanAsk(ModelId("m"), 7, "7.0.0", part or a_part(), "sha256:" + "a" * 64)


def an_order(*parts: Part) -> BorrowOrder:
    return BorrowOrder(ModelId("m"), 7, "7.0.0", "sha256:" + "a" * 64, SplitPlan(parts))


class FakeLender:
    """Grants and commits whatever is asked, unless told otherwise."""

    def __init__(self) -> None:
        self.refusal: MeshdError | None = None
        self.failure: MeshdError | None = None
        """Of commits."""
        self.go_on = asyncio.Event()
        """Commits wait for it."""
        self.go_on.set()
        self.words: tuple[str, ...] = ()
        """Said by each commit before it waits."""
        self.warms = 1000
        self.granted: list[Loan] = []
        self.hosts: list[NodeId] = []
        self.committing = asyncio.Event()
        self.commits_running = 0
        self.loads: list[LoanId] = []
        self.loading = asyncio.Event()
        """Set when a host has loaded."""
        self.renewed = asyncio.Event()
        self.ends: list[tuple[LoanId, str]] = []
        self.ended = asyncio.Event()

    def grant(self, host: NodeId, ask: LoanAsk) -> Loan:
        self.hosts.append(host)
        if self.refusal is not None:
            raise self.refusal
        loan = Loan(LoanId(f"loan-{len(self.granted):032x}"), host, ask)
        self.granted.append(loan)
        return loan

    async def commit(self, loan: Loan, moved: Callable[[str], None]) -> int:
        assert loan in self.granted
        self.commits_running += 1
        try:
            for words in self.words:
                moved(words)
            self.committing.set()
            await self.go_on.wait()
            if self.failure is not None:
                raise self.failure
            return self.warms
        finally:
            self.commits_running -= 1

    def loaded(self, loan: Loan) -> None:
        assert loan in self.granted
        self.loads.append(loan.id)
        self.loading.set()

    def renew(self, loan: Loan) -> None:
        assert loan in self.granted
        self.renewed.set()

    def end(self, loan: Loan, reason: str) -> None:
        assert self.commits_running == 0, "ended under a commit"
        self.ends.append((loan.id, reason))
        self.ended.set()

    async def all_ended(self, within_s: float = 5.0) -> None:
        """Until every loan was ended, and none twice."""
        async with asyncio.timeout(within_s):
            while len(self.ends) < len(self.granted):
                self.ended.clear()
                await self.ended.wait()
        assert sorted(loan for loan, _ in self.ends) == sorted(loan.id for loan in self.granted)


class FakeTransport(asyncio.Transport):
    """Keeps what is written; `said` are the frames in it."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._reader = FrameReader(FRAME_LIMIT)
        self._closing = False
        self.said: list[dict[str, Any]] = []
        self.backlog_bytes = 0
        self._wrote = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.said += [parse(body) for body in self._reader.feed(bytes(data))]
        self._wrote.set()

    async def more(self) -> None:
        """Until something is written."""
        self._wrote.clear()
        await self._wrote.wait()

    def kinds(self) -> list[str]:
        """Of the frames written, without beats."""
        return [said["t"] for said in self.said if said["t"] != "beat"]

    def get_write_buffer_size(self) -> int:
        return self.backlog_bytes

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

"""What tests use in place of the rooms that borrow memory of other nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from meshd.errors import MeshdError
from meshd.ids import NodeId
from meshd.runtime.group import LoanOrder
from meshd.view import Part, SplitPlan

PLAN = SplitPlan(
    parts=(
        Part(NodeId("b"), "b", (("CPU", 1 << 20),), (1,), 0, False, 0.4),
        Part(NodeId("c"), "c", (("CPU", 2 << 20),), (1,), 1, True, 0.6),
    )
)


class FakeLender:
    """Workers that grant, refuse and vanish when the test wants."""

    def __init__(self, endpoints: tuple[str, ...] = ("127.0.0.1:1", "127.0.0.1:2")) -> None:
        self.endpoints = endpoints
        self.warmed_bytes = 0
        self.orders: list[LoanOrder] = []
        self.ended: list[str] = []
        """Why what was borrowed was given back."""
        self.refusal: MeshdError | None = None
        self.grants = asyncio.Event()
        """Until then the workers think about it."""
        self.grants.set()
        self.undoing = asyncio.Event()
        """The asking was ended early."""
        self.undone = asyncio.Event()
        """Until then the workers undo what was begun when the asking ends early."""
        self.undone.set()
        self.gives_back = asyncio.Event()
        """Until then `end` takes its time."""
        self.gives_back.set()
        self.lost: Callable[[str], None]
        self.moved: Callable[[str], None]

    async def borrow(
        self, order: LoanOrder, lost: Callable[[str], None], moved: Callable[[str], None]
    ) -> FakeLender:
        self.orders.append(order)
        self.lost, self.moved = lost, moved
        try:
            await self.grants.wait()
        except asyncio.CancelledError:
            self.undoing.set()
            await self.undone.wait()
            raise
        if self.refusal is not None:
            raise self.refusal
        return self

    async def end(self, reason: str) -> None:
        self.ended.append(reason)
        await self.gives_back.wait()

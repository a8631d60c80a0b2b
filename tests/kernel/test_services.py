"""Services start in order, stop in reverse within their limits, and fail together."""

from __future__ import annotations

import asyncio

import pytest

from meshd.kernel import Board, Service, ServiceStack


class Recorded(Service):
    def __init__(self, name: str, journal: list[str]) -> None:
        super().__init__()
        self.name = name
        self.journal = journal
        self.start_limit_s = self.stop_limit_s = 1.0

    async def main(self) -> None:
        self.journal.append(f"{self.name} up")
        self.ready.set()
        await self.stopping.wait()
        self.journal.append(f"{self.name} down")


async def test_order_of_start_and_stop() -> None:
    journal: list[str] = []
    stack = ServiceStack()
    for name in ("a", "b"):
        await stack.start(Recorded(name, journal))
    await stack.stop()
    assert journal == ["a up", "b up", "b down", "a down"]
    assert stack.failed.cancelled()


async def test_a_service_that_fails_before_it_is_ready() -> None:
    class Broken(Recorded):
        async def main(self) -> None:
            raise ZeroDivisionError

    stack = ServiceStack()
    with pytest.raises(ExceptionGroup) as caught:
        await stack.start(Broken("x", []))
    assert caught.group_contains(ZeroDivisionError)
    await stack.stop()


async def test_a_service_that_ends_before_it_is_ready() -> None:
    class Short(Recorded):
        async def main(self) -> None:
            return

    stack = ServiceStack()
    with pytest.raises(RuntimeError, match="before it was ready"):
        await stack.start(Short("x", []))
    await stack.stop()


async def test_a_service_that_never_gets_ready_is_given_up() -> None:
    class Slow(Recorded):
        async def main(self) -> None:
            await asyncio.Event().wait()

    stack = ServiceStack()
    slow = Slow("slow", [])
    slow.start_limit_s = slow.stop_limit_s = 0.05
    with pytest.raises(TimeoutError):
        await stack.start(slow)
    await stack.stop()


@pytest.mark.parametrize("how", ["main", "task", "return"])
async def test_any_unasked_end_is_the_stacks(how: str) -> None:
    class Dying(Recorded):
        async def main(self) -> None:
            self.ready.set()
            await go.wait()
            if how == "main":
                raise KeyError("main")
            if how == "task":
                self.spawn(self.fail(), name="fail")
                await self.stopping.wait()

        async def fail(self) -> None:
            raise KeyError("task")

    go = asyncio.Event()
    stack = ServiceStack()
    other = Recorded("other", [])
    await stack.start(other)
    await stack.start(Dying("dying", []))
    go.set()
    async with asyncio.timeout(2):
        with pytest.raises((RuntimeError, ExceptionGroup)):
            await stack.failed
    await stack.stop()
    assert other.journal == ["other up", "other down"]


async def test_tasks_left_by_main_are_cancelled() -> None:
    ended: list[str] = []

    class Busy(Recorded):
        async def main(self) -> None:
            self.spawn(self.work(), name="work")
            await super().main()

        async def work(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("work")

    stack = ServiceStack()
    await stack.start(Busy("busy", []))
    await stack.stop()
    assert ended == ["work"]


async def test_a_service_over_its_stop_limit_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(Recorded):
        async def main(self) -> None:
            self.ready.set()
            await asyncio.Event().wait()

    stack = ServiceStack()
    service = Stubborn("stubborn", [])
    service.stop_limit_s = 0.05
    await stack.start(service)
    await stack.stop()
    assert "stubborn did not stop within" in caplog.text


async def test_nothing_is_spawned_outside_main() -> None:
    service = Recorded("idle", [])
    with pytest.raises(RuntimeError, match="outside main"):
        service.spawn(asyncio.sleep(0), name="x")


def test_the_board_tells_changes_in_order_and_only_changes() -> None:
    board = Board(0)
    seen: list[tuple[str, int]] = []

    def first(value: int) -> None:
        seen.append(("first", value))
        if value == 1:
            board.publish(2)  # must not reach `second` before 1 does

    board.subscribe(first)
    stop = board.subscribe(lambda value: seen.append(("second", value)))
    board.publish(0)
    board.publish(1)
    stop()
    stop()
    board.publish(3)
    assert board.current == 3
    assert seen == [("first", 1), ("second", 1), ("first", 2), ("second", 2), ("first", 3)]

"""The driver runs a machine to completion, in order, and wakes it when it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from meshd.kernel import Driver, FlightRecorder, ManualClock, MonotonicClock
from meshd.kernel.machine import Tick

Event = str
Order = str


class Script:
    """Answers each event with the orders written down for it."""

    def __init__(self, answers: dict[str, list[Order]]) -> None:
        self.answers = answers
        self.seen: list[tuple[str, float]] = []
        self.wanted: float | None = None

    def handle(self, event: Event | Tick, now: float) -> list[Order]:
        name = event if isinstance(event, str) else "tick"
        self.seen.append((name, now))
        if name == "tick":
            self.wanted = None
        return self.answers.get(name, [])

    def due(self) -> float | None:
        return self.wanted


def drive(script: Script, run: Callable[[Order], None], **more: object) -> Driver[Event, Order]:
    return Driver("script", script, run, clock=ManualClock(5.0), **more)  # type: ignore[arg-type]


async def test_effects_run_in_order_and_a_post_from_one_queues_behind() -> None:
    ran: list[str] = []
    script = Script({"a": ["x", "y"], "b": ["z"]})

    def run(order: Order) -> None:
        ran.append(order)
        if order == "x":
            driver.post("b")
            ran.append("x over")

    driver = drive(script, run)
    driver.post("a")
    assert ran == ["x", "x over", "y", "z"]
    assert script.seen == [("a", 5.0), ("b", 5.0)]


async def test_an_effect_that_raises_leaves_the_driver_usable() -> None:
    def run(order: Order) -> None:
        if order == "bad":
            raise ZeroDivisionError

    script = Script({"a": ["bad"]})
    driver = drive(script, run)
    with pytest.raises(ZeroDivisionError):
        driver.post("a")
    driver.post("c")
    assert [name for name, _ in script.seen] == ["a", "c"]


async def test_the_recorder_has_events_and_effects() -> None:
    recorder = FlightRecorder(capacity=2)
    driver = drive(Script({"a": ["x"]}), lambda order: None, recorder=recorder)
    for event in ("lost", "a", "b"):
        driver.post(event)
    assert recorder.render() == "5.000000 script 'a' -> 'x'\n5.000000 script 'b' -> -\n"
    assert [e.event for e in recorder.entries("script")] == ["a", "b"]
    assert recorder.entries("other") == ()


async def test_a_tick_comes_when_it_is_due_and_not_before() -> None:
    clock = MonotonicClock()
    ticked = asyncio.Event()
    script = Script({})
    times: list[float] = []

    class Timed(Script):
        def handle(self, event: Event | Tick, now: float) -> list[Order]:
            if isinstance(event, Tick):
                times.append(now)
                ticked.set()
            return super().handle(event, now)

    script = Timed({})
    driver: Driver[Event, Order] = Driver("t", script, lambda order: None, clock=clock)
    script.wanted = due = clock.now() + 0.05
    driver.post("arm")
    async with asyncio.timeout(2):
        await ticked.wait()
    assert len(times) == 1
    assert times[0] >= due


async def test_a_later_due_replaces_an_earlier_timer() -> None:
    clock = ManualClock()
    script = Script({})
    driver: Driver[Event, Order] = Driver("t", script, lambda order: None, clock=clock)
    script.wanted = 0.01
    driver.post("arm")
    script.wanted = None
    driver.post("disarm")
    clock.advance(1.0)
    await asyncio.sleep(0.03)  # the time that must pass without a tick
    assert [name for name, _ in script.seen] == ["arm", "disarm"]


async def test_a_closed_driver_hears_nothing() -> None:
    script = Script({"a": ["x"]})
    driver = drive(script, lambda order: driver.close())
    script.wanted = 5.0
    driver.post("a")
    driver.post("b")
    await asyncio.sleep(0.01)  # a timer that was left would fire
    assert [name for name, _ in script.seen] == ["a"]


def test_a_manual_clock_does_not_go_back() -> None:
    clock = ManualClock(3.0)
    clock.advance(1.5)
    assert clock.now() == 4.5
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-1)


async def test_a_machine_that_is_not_woken_is_overdue() -> None:
    """Nobody hears of an order that fails in a timer: the machine only stands still."""
    clock = ManualClock(5.0)
    script = Script({})
    driver: Driver[Event, Order] = Driver("script", script, lambda _: None, clock=clock)
    assert driver.overdue_s == 0.0
    script.wanted = 6.0
    assert driver.overdue_s == 0.0, "not yet"
    clock.advance(31.0)
    assert driver.overdue_s == 30.0
    driver.close()
    assert driver.overdue_s == 0.0, "a closed one owes nothing"

"""A measurement on the machine that runs the tests."""

from __future__ import annotations

import threading

import pytest

from meshd.runtime.devices import measure_memory_speed
from meshd.runtime.devices.memory_speed import BUFFERS, FREE_SHARE, LEAST_BUFFER


def test_it_is_a_speed_that_memory_can_have_and_leaves_no_thread() -> None:
    before = threading.active_count()
    speed = measure_memory_speed(BUFFERS * FREE_SHARE)
    assert speed is not None
    assert speed > 100_000_000
    assert len(str(speed).rstrip("0")) <= 2
    assert threading.active_count() == before


@pytest.mark.parametrize("free", [0, LEAST_BUFFER])
def test_without_free_memory_nothing_is_measured(free: int) -> None:
    assert measure_memory_speed(free) is None


def test_a_thread_that_cannot_start_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert measure_memory_speed(BUFFERS * FREE_SHARE) is None

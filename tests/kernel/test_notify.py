"""What the service manager is told, read from a real socket; and when the watchdog is fed."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.kernel import MonotonicClock
from meshd.kernel.notify import Notifier
from meshd.kernel.pulse import LAG_LIMIT_S, PulseJudge
from meshd.kernel.watchdog import Watchdog

RECEIVE_LIMIT_S = 5.0


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The socket of a service manager, and what it puts into NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@meshd-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(RECEIVE_LIMIT_S)
        channel.bind(name.replace("@", "\0", 1) if name[0] == "@" else name)
        yield channel, name


def test_every_word(manager: tuple[socket.socket, str]) -> None:
    channel, name = manager
    notifier = Notifier(name)
    assert notifier.heard
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    notifier.ready()
    notifier.status("ready;\nREADY=1  2 of 2 models")  # must not become another assignment
    notifier.alive()
    notifier.stopping(90.0)
    notifier.main_pid(4711)
    notifier.reloading()
    got = [channel.recv(4096).decode() for _ in range(6)]
    assert got[:5] == [
        "READY=1",
        "STATUS=ready; READY=1 2 of 2 models",
        "WATCHDOG=1",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=90000000",
        "MAINPID=4711",
    ]
    first, _, at = got[5].rpartition("=")
    assert first == "RELOADING=1\nMONOTONIC_USEC"
    assert before <= int(at) / 1e6 + 1e-6 <= time.clock_gettime(time.CLOCK_MONOTONIC) + 1e-6


@pytest.mark.parametrize("address", [None, "", "vsock:2:9", "/nowhere/notify"])
def test_nobody_to_tell(address: str | None) -> None:
    notifier = Notifier(address)
    assert notifier.heard == (address == "/nowhere/notify")
    notifier.ready()


def test_one_bad_look_does_not_end_a_process_and_a_lasting_fault_does() -> None:
    judge = PulseJudge(30.0)
    assert judge.period_s == 7.5
    fine = judge.judge(0.0, {"API": None})
    assert (fine.alive, fine.changed) == (True, False)
    bad = judge.judge(0.0, {"API": "silent", "engines": None})
    assert (bad.faults, bad.changed) == (("API: silent",), True)
    still = judge.judge(0.0, {"API": "silent"})
    assert (still.alive, still.changed) == (False, False)
    again = judge.judge(0.0, {"API": None})
    assert (again.alive, again.changed) == (True, True)


def test_a_late_loop_is_a_fault() -> None:
    judge = PulseJudge(60.0)
    assert judge.judge(LAG_LIMIT_S, {}).alive
    assert judge.judge(LAG_LIMIT_S + 0.1, {"API": "x"}).faults == (
        "event loop: 5.1 s late",
        "API: x",
    )
    assert not PulseJudge(4.0).judge(1.1, {}).alive, "never more than one period"


async def test_only_a_good_look_feeds(
    manager: tuple[socket.socket, str], caplog: pytest.LogCaptureFixture
) -> None:
    channel, name = manager
    channel.setblocking(False)
    answers = iter([None, "broken", "broken", None])
    fed_after: list[int] = []
    asked = 0

    async def check() -> str | None:
        nonlocal asked
        _drain(channel, fed_after, asked)
        asked += 1
        answer = next(answers, None)
        if asked == 5:
            watchdog.stopping.set()
        return answer

    watchdog = Watchdog(Notifier(name), 0.08, {"check": check}, clock=MonotonicClock())
    await watchdog.run()
    _drain(channel, fed_after, asked)
    assert fed_after == [0, 1, 4, 5]
    assert "not fed: check: broken" in caplog.text


async def test_a_check_without_an_answer_has_failed(
    manager: tuple[socket.socket, str], caplog: pytest.LogCaptureFixture
) -> None:
    channel, name = manager
    channel.setblocking(False)

    async def silent() -> str | None:
        try:
            await asyncio.Event().wait()
        finally:
            watchdog.stopping.set()
        return None

    watchdog = Watchdog(Notifier(name), 0.08, {"silent": silent}, clock=MonotonicClock())
    await watchdog.run()
    fed: list[int] = []
    _drain(channel, fed, 0)
    assert fed == [0], "at the start, and not after"
    assert "silent: no answer within 0.02 s" in caplog.text


def _drain(channel: socket.socket, fed_after: list[int], asked: int) -> None:
    """Note each WATCHDOG=1 that has come, with how many looks there had been."""
    try:
        while channel.recv(4096) == b"WATCHDOG=1":
            fed_after.append(asked)
    except BlockingIOError:
        pass

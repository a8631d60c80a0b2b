"""The daemon's side: real children, good, killed, cancelled, and impostors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.transfer.fetching import LINE_LIMIT, Fetch
from meshd.cache.transfer.words import Done, FetchFailed, News, Progress, Resolved
from tests.cache.transfer.world import NAMES, REPO, content, landed, manifest_of, order_for
from tests.hub import LocalHub, Slow

FILES = {NAMES[0]: content(1, 3 * CHUNK_BYTES), NAMES[1]: content(2, 100)}
TOTAL = sum(len(data) for data in FILES.values())
CHILD = (sys.executable, "-m", "meshd.fetcher")


def impostor(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import sys, os, time; sys.stdin.read(); {code}")


async def outcome(
    home: Path, command: tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> FetchFailed:
    async with await Fetch.start(order_for(home, None), command, environment) as fetch:
        news = [one async for one in fetch]
    assert isinstance(news[-1], FetchFailed)
    return news[-1]


async def test_a_child_fetches_and_says_so(hub: LocalHub, tmp_path: Path) -> None:
    manifest = manifest_of(FILES, hub.add(REPO, FILES))
    environment = hub.environment(tmp_path)
    async with await Fetch.start(order_for(tmp_path, None), CHILD, environment) as fetch:
        news: list[News] = [one async for one in fetch]
    assert news[0] == Resolved(manifest=manifest)
    assert news[-1] == Done(fetched_bytes=TOTAL, sources={"hub": TOTAL})
    for path, data in FILES.items():
        assert landed(tmp_path, manifest, path) == data


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "cancelled"])
async def test_an_end_in_the_middle_costs_what_was_under_way(
    hub: LocalHub, tmp_path: Path, kill: bool
) -> None:
    manifest = manifest_of(FILES, hub.add(REPO, FILES))
    environment = hub.environment(tmp_path)
    order = order_for(tmp_path, manifest, workers=1)
    hub.faults.add(NAMES[0], Slow(8e6), times=None)
    last: News | None = None
    async with await Fetch.start(order, CHILD, environment) as fetch:
        async for news in fetch:
            if isinstance(news, Progress) and news.done_bytes >= CHUNK_BYTES:
                if kill:
                    os.kill(fetch.pid, signal.SIGKILL)
                else:
                    fetch.cancel()
            last = news
    assert isinstance(last, FetchFailed)
    assert last.code == ("fetch_died" if kill else "cancelled")
    assert not last.permanent
    hub.faults.clear()
    hub.forget_requests()
    async with await Fetch.start(order, CHILD, environment) as fetch:
        assert isinstance([news async for news in fetch][-1], Done)
    assert hub.sent(NAMES[0]) <= 2 * CHUNK_BYTES
    assert landed(tmp_path, manifest, NAMES[0]) == FILES[NAMES[0]]


async def test_leaving_early_ends_the_child(hub: LocalHub, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    hub.faults.add(NAMES[0], Slow(1e6), times=None)
    environment = hub.environment(tmp_path)
    async with await Fetch.start(order_for(tmp_path, None), CHILD, environment) as fetch:
        async for news in fetch:
            if isinstance(news, Resolved):
                break
    with pytest.raises(ProcessLookupError):
        os.kill(fetch.pid, 0)


async def test_a_death_is_told_with_its_last_words(tmp_path: Path) -> None:
    end = await outcome(tmp_path, impostor("sys.exit('disk on fire')"))
    assert end.code == "fetch_died"
    assert "status 1: disk on fire" in end.message
    end = await outcome(tmp_path, impostor("os.kill(os.getpid(), 9)"))
    assert "signal 9" in end.message


async def test_a_child_that_does_not_take_its_order(tmp_path: Path) -> None:
    end = await outcome(tmp_path, (sys.executable, "-c", "pass"))
    assert end.code == "fetch_died"


async def test_nonsense_and_endless_lines_end_it(tmp_path: Path) -> None:
    end = await outcome(tmp_path, impostor("print('hello', flush=True); time.sleep(60)"))
    assert "nonsense" in end.message
    flood = f"sys.stdout.write('x' * {2 * LINE_LIMIT + 1}); sys.stdout.flush(); time.sleep(60)"
    end = await outcome(tmp_path, impostor(flood))
    assert "without end" in end.message


async def test_an_order_that_is_none_is_refused(tmp_path: Path) -> None:
    code = "import subprocess as s; s.run([sys.executable, '-m', 'meshd.fetcher'], input=b'{}')"
    end = await outcome(tmp_path, impostor(code))
    assert (end.code, end.permanent) == ("bad_order", True)

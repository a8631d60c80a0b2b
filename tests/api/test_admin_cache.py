"""The admin socket's side of the cache: bodies, streams of lines, who hangs up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshd.api.admin import AdminServer
from meshd.errors import HubRefused, MeshdError, NoSpace, NotInCache
from meshd.kernel import FlightRecorder

TIME_LIMIT_S = 10.0


class Cache:
    """Says what it is asked; `pull` gives one event, then waits to be told to go on."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: MeshdError | None = None

    async def ls(self) -> dict[str, Any]:
        self.asked.append("ls")
        return {"sets": []}

    async def rm(self, ref: str, *, force: bool) -> dict[str, Any]:
        self.asked.append(("rm", ref, force))
        raise NotInCache(f"nothing of {ref} is here")

    async def prune(self, *, dry_run: bool, force: bool) -> dict[str, Any]:
        self.asked.append(("prune", dry_run, force))
        return {"freed_bytes": 0}

    async def pull(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(("pull", ref))
        try:
            yield {"t": "progress", "done_bytes": 1}
            await self.go_on.wait()
            if self.error is not None:
                raise self.error
            yield {"t": "done"}
        finally:
            self.ended.set()

    async def verify(self, ref: str | None) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(("verify", ref))
        yield {"t": "verified"}

    async def repair(self, ref: str) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(("repair", ref))
        if ref:
            raise HubRefused("accept the licence")
        yield {}


@pytest.fixture
async def cache() -> Cache:
    return Cache()


class Client:
    """One request at a time, its answer read piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writers: list[asyncio.StreamWriter] = []

    async def post(self, target: str, body: Any | None = None) -> Client:
        self.reader, writer = await asyncio.open_unix_connection(self._path)
        self._writers.append(writer)
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
        writer.write(head.encode() + payload)
        self.status = int((await self.reader.readline()).split()[1])
        self.headers: dict[str, str] = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        return self

    async def event(self) -> Any:
        """The next chunk, which is one line; None at the end."""
        size = int(await self.reader.readline(), 16)
        chunk = await self.reader.readexactly(size + 2)
        return json.loads(chunk) if size else None

    async def whole(self) -> Any:
        return json.loads(await self.reader.readexactly(int(self.headers["content-length"])))

    async def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()
            await writer.wait_closed()
        self._writers.clear()


@pytest.fixture
async def client(tmp_path: Path, cache: Cache) -> AsyncIterator[Client]:
    server = AdminServer(
        tmp_path / "admin.sock",
        load=lambda _: pytest.fail("not asked for"),
        unload=lambda _: pytest.fail("not asked for"),
        status=dict,
        recorder=FlightRecorder(),
        cache=cache,
    )
    task = asyncio.create_task(server.run())
    await server.ready.wait()
    made = Client(tmp_path / "admin.sock")
    async with asyncio.timeout(TIME_LIMIT_S):
        yield made
    await made.hang_up()
    server.stopping.set()
    await task


async def test_answers(client: Client, cache: Cache) -> None:
    for target, body, answer in (
        ("/cache/ls", None, {"sets": []}),
        ("/cache/prune", None, {"freed_bytes": 0}),
        ("/cache/prune", {"dry_run": True, "force": True}, {"freed_bytes": 0}),
    ):
        await client.post(target, body)
        assert (client.status, await client.whole()) == (200, answer)
    await client.post("/cache/rm", {"ref": "x", "force": True})
    assert client.status == 404
    assert (await client.whole())["error"] == {
        "code": "not_in_cache",
        "message": "nothing of x is here",
    }
    assert cache.asked == ["ls", ("prune", False, False), ("prune", True, True), ("rm", "x", True)]


async def test_events_are_lines_and_come_as_they_happen(client: Client, cache: Cache) -> None:
    await client.post("/cache/pull", {"ref": "o/r"})
    assert (client.status, client.headers["content-type"]) == (200, "application/x-ndjson")
    assert await client.event() == {"t": "progress", "done_bytes": 1}
    assert not cache.go_on.is_set()
    cache.go_on.set()
    assert await client.event() == {"t": "done"}
    assert await client.event() is None
    await client.post("/cache/verify")
    assert await client.event() == {"t": "verified"}
    assert cache.asked == [("pull", "o/r"), ("verify", None)]


async def test_who_hangs_up_cancels(client: Client, cache: Cache) -> None:
    await client.post("/cache/pull", {"ref": "o/r"})
    await client.event()
    await client.hang_up()
    await cache.ended.wait()
    assert not cache.go_on.is_set()


async def test_an_error_before_the_first_event_has_a_status(client: Client) -> None:
    await client.post("/cache/repair", {"ref": "o/r"})
    assert client.status == 502
    assert (await client.whole())["error"]["code"] == "hub_refused"


async def test_a_later_error_is_the_last_line(client: Client, cache: Cache) -> None:
    cache.error = NoSpace("4 GB are missing")
    cache.go_on.set()
    await client.post("/cache/pull", {"ref": "o/r"})
    await client.event()
    assert await client.event() == {
        "t": "failed",
        "code": "no_space",
        "message": "4 GB are missing",
        "permanent": True,
        "retry_after_s": None,
    }
    assert await client.event() is None


@pytest.mark.parametrize(
    ("target", "body", "field"),
    [
        ("ls", {"all": True}, "all"),
        ("pull", {}, "ref"),
        ("pull", {"ref": ""}, "ref"),
        ("pull", {"ref": "x" * 4097}, "ref"),
        ("repair", {"ref": 7}, "ref"),
        ("verify", {"ref": ""}, "ref"),
        ("rm", {"ref": "x", "force": "often"}, "force"),
        ("prune", {"dry": True}, "dry"),
        ("prune", [], "body"),
    ],
)
async def test_bad_bodies_are_named_and_reach_nobody(
    client: Client, cache: Cache, target: str, body: Any, field: str
) -> None:
    await client.post(f"/cache/{target}", body)
    assert client.status == 400
    assert field in (await client.whole())["error"]["message"]
    assert cache.asked == []

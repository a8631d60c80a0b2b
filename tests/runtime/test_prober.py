"""The questions to an engine, with an engine that answers what it is told to."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshd.ids import InstanceId
from meshd.runtime import prober
from meshd.runtime.child_events import EngineFacts

INSTANCE = InstanceId("~0011223344556677")
HEALTHY: dict[str, tuple[int, Any]] = {
    "/health": (200, {"status": "ok"}),
    "/v1/models": (200, {"data": [{"id": "m", "aliases": ["m", f"m{INSTANCE}"]}]}),
    "/props": (200, {"total_slots": 2, "default_generation_settings": {"n_ctx": 512}}),
    "/slots": (200, [{"id": 0}]),
    "/completion": (200, {"content": "x"}),
}


class ScriptedEngine:
    """Answers by path; an answer of None is silence, of bytes is sent as it is."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, Any] = dict(HEALTHY)
        self.asked: list[tuple[str, str, bytes]] = []
        self.open = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            self.asked.append((method, path, await reader.readexactly(length)))
            answer = self.answers[path]
            if answer is None:
                await reader.read()  # until the other side gives up
            elif isinstance(answer, bytes):
                writer.write(answer)
            else:
                status, body = answer
                data = json.dumps(body).encode()
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
                )
        except OSError:
            pass
        finally:
            writer.close()
            self.open -= 1


@pytest.fixture
async def engine(short_dir: Path) -> AsyncIterator[ScriptedEngine]:
    engine = ScriptedEngine(short_dir / "e.sock")
    await engine.start()
    yield engine
    await engine.close()


async def startup(engine: ScriptedEngine) -> EngineFacts | prober.NotYet | prober.Wrong:
    return await prober.startup(engine.path, INSTANCE, 1.0)


async def test_ready_is_health_identity_slots_and_one_token(engine: ScriptedEngine) -> None:
    assert await startup(engine) == EngineFacts(slots=2, context_length=512)
    assert [path for _, path, _ in engine.asked] == [
        *("/health", "/v1/models", "/props", "/completion")
    ]
    method, _, body = engine.asked[-1]
    assert method == "POST"
    assert json.loads(body)["n_predict"] == 1


async def test_no_socket_is_not_yet(short_dir: Path) -> None:
    assert isinstance(await prober.startup(str(short_dir / "x"), INSTANCE, 1.0), prober.NotYet)
    assert isinstance(await prober.liveness(str(short_dir / "x")), prober.Wrong)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/completion"])
async def test_loading_is_not_yet(engine: ScriptedEngine, path: str) -> None:
    engine.answers[path] = (503, {"error": {"message": "Loading model"}})
    assert await startup(engine) == prober.NotYet()


async def test_a_stranger_is_not_trusted_nor_asked_for_more(engine: ScriptedEngine) -> None:
    engine.answers["/v1/models"] = (200, {"data": [{"id": "m", "aliases": ["m", "m~ffff"]}]})
    found = await startup(engine)
    assert isinstance(found, prober.Wrong)
    assert found.final
    assert "/completion" not in [path for _, path, _ in engine.asked]


@pytest.mark.parametrize("models", [{}, {"data": []}, [], "x", {"data": [{"aliases": None}]}])
async def test_a_stranger_may_answer_anything(engine: ScriptedEngine, models: Any) -> None:
    engine.answers["/v1/models"] = (200, models)
    found = await startup(engine)
    assert isinstance(found, prober.Wrong)
    assert found.final


@pytest.mark.parametrize("props", [(401, {}), (200, {}), (200, []), (200, {"total_slots": "x"})])
async def test_without_slots_and_context_it_is_not_ready(
    engine: ScriptedEngine, props: tuple[int, Any]
) -> None:
    engine.answers["/props"] = props
    found = await startup(engine)
    assert isinstance(found, prober.Wrong)
    assert not found.final
    assert "/props" in found.reason


async def test_an_engine_for_embeddings_is_ready_and_says_so(engine: ScriptedEngine) -> None:
    engine.answers["/completion"] = (501, {"error": {"message": "not supported"}})
    found = await startup(engine)
    assert isinstance(found, EngineFacts)
    assert found.note == "makes embeddings only"
    assert await prober.generate(engine.path, 1.0) is None


async def test_a_first_token_that_fails_is_final(engine: ScriptedEngine) -> None:
    engine.answers["/completion"] = (500, {"error": "no KV"})
    found = await startup(engine)
    assert isinstance(found, prober.Wrong)
    assert found.final
    assert "no KV" in found.reason
    wrong = await prober.generate(engine.path, 1.0)
    assert isinstance(wrong, prober.Wrong)
    assert "500" in wrong.reason


async def test_every_question_has_a_deadline(engine: ScriptedEngine) -> None:
    engine.answers["/completion"] = None
    assert await prober.generate(engine.path, 0.05) == prober.Wrong("no token within 0.05 s")
    async with asyncio.timeout(5.0):
        while engine.open:  # noqa: ASYNC110 (the question was taken back)
            await asyncio.sleep(0.005)


async def test_alive_is_health_and_slots(engine: ScriptedEngine) -> None:
    assert await prober.liveness(engine.path) is None
    engine.answers["/slots"] = (501, {})  # turned off by the user's own arguments
    assert await prober.liveness(engine.path) is None
    engine.answers["/slots"] = (500, {})
    assert await prober.liveness(engine.path) == prober.Wrong("/slots answered 500")


@pytest.mark.parametrize("raw", [b"", b"hello\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200"])
async def test_what_is_not_http_is_no_answer(engine: ScriptedEngine, raw: bytes) -> None:
    engine.answers["/health"] = raw
    assert await prober.liveness(engine.path) == prober.Wrong("/health answered nothing")


async def test_an_endless_answer_is_cut(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "ANSWER_LIMIT_BYTES", 1000)
    engine.answers["/health"] = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000
    assert await prober.liveness(engine.path) == prober.Wrong("/health answered nothing")


async def test_a_question_that_was_not_asked_says_nothing_of_the_engine(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_descriptor(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "open_unix_connection", no_descriptor)
    assert await startup(engine) == prober.NotYet()
    assert await prober.liveness(engine.path) == prober.NotYet()
    assert await prober.generate(engine.path, 1.0) == prober.NotYet()
    assert engine.asked == []

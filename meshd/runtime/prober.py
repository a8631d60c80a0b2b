"""Asks an engine how it is, over its unix socket. One short connection a question."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass
from typing import Any

import orjson

from meshd.ids import InstanceId
from meshd.runtime.child_events import EngineFacts

ANSWER_LIMIT_S = 5.0
ANSWER_LIMIT_BYTES = 8 * 1024 * 1024


OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Why a question was not asked: this process, or the machine, has run out of something."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """It loads; or the question could not be asked, which says nothing of the engine."""


@dataclass(frozen=True, slots=True)
class Wrong:
    reason: str
    final: bool = False


async def startup(
    socket_path: str, instance: InstanceId, generation_limit_s: float
) -> EngineFacts | NotYet | Wrong:
    """Health, identity, slots and context, one generated token: all that READY needs."""
    try:
        return await _startup(socket_path, instance, generation_limit_s)
    except _NotAsked:
        return NotYet()


async def _startup(
    socket_path: str, instance: InstanceId, generation_limit_s: float
) -> EngineFacts | NotYet | Wrong:
    health = await _ask(socket_path, "GET", "/health")
    if health is None or health.status == 503:
        return NotYet()
    if health.status != 200:
        return Wrong(f"/health answered {health.status}")
    models = await _ask(socket_path, "GET", "/v1/models")
    if models is None or models.status != 200:
        return NotYet()
    if not any(alias.endswith(instance) for alias in _aliases(models.json())):
        return Wrong("another process answers on the engine's socket", final=True)
    props = await _ask(socket_path, "GET", "/props")
    facts = _facts(props.json()) if props is not None and props.status == 200 else None
    if facts is None:
        return Wrong("/props does not tell slots and context")
    return await _with_generation(socket_path, facts, generation_limit_s)


async def liveness(socket_path: str) -> NotYet | Wrong | None:
    """None if the engine answers. `/slots` goes through its work queue, `/health` does not."""
    for path in ("/health", "/slots"):
        try:
            answer = await _ask(socket_path, "GET", path)
        except _NotAsked:
            return NotYet()
        # 501: started without the slots endpoint, by the user's own arguments.
        if answer is None or answer.status not in (200, 501):
            return Wrong(f"{path} answered {'nothing' if answer is None else answer.status}")
    return None


async def generate(socket_path: str, limit_s: float) -> NotYet | Wrong | None:
    """One token; None if it came, or if the engine only makes embeddings."""
    try:
        answer = await _ask(socket_path, "POST", "/completion", _ONE_TOKEN, limit_s)
    except _NotAsked:
        return NotYet()
    if answer is None:
        return Wrong(f"no token within {limit_s:g} s")
    if answer.status in (200, 501):
        return None
    return Wrong(f"a generation of one token answered {answer.status}: {answer.text()}")


async def measure(socket_path: str, tokens: int, limit_s: float) -> float | Wrong:
    """Tokens per second of a short answer, as the engine counted them."""
    asked = {"prompt": "1", "n_predict": tokens, "cache_prompt": False, "ignore_eos": True}
    try:
        answer = await _ask(socket_path, "POST", "/completion", orjson.dumps(asked), limit_s)
    except _NotAsked:
        return Wrong("this process ran out of files or memory")
    if answer is None:
        return Wrong(f"no answer of {tokens} tokens within {limit_s:g} s")
    body: Any = answer.json() if answer.status == 200 else None
    try:
        return float(body["timings"]["predicted_per_second"])
    except (KeyError, TypeError, ValueError):
        return Wrong(f"an answer of {tokens} tokens came as {answer.status}: {answer.text()}")


_ONE_TOKEN = orjson.dumps({"prompt": "1", "n_predict": 1, "cache_prompt": False})


async def _with_generation(
    socket_path: str, facts: EngineFacts, limit_s: float
) -> EngineFacts | NotYet | Wrong:
    answer = await _ask(socket_path, "POST", "/completion", _ONE_TOKEN, limit_s)
    if answer is None or answer.status == 503:
        return NotYet()
    if answer.status == 200:
        return facts
    if answer.status == 501:
        return EngineFacts(facts.slots, facts.context_length, "makes embeddings only")
    return Wrong(f"its first token did not come: {answer.status} {answer.text()}", final=True)


def _aliases(models: Any) -> tuple[str, ...]:
    try:
        entry = models["data"][0]
        return (str(entry["id"]), *map(str, entry.get("aliases", ())))
    except (KeyError, IndexError, TypeError):
        return ()


def _facts(props: Any) -> EngineFacts | None:
    try:
        return EngineFacts(
            int(props["total_slots"]), int(props["default_generation_settings"]["n_ctx"])
        )
    except (KeyError, TypeError, ValueError):
        return None


class _NotAsked(Exception):
    """See OURS."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes

    def json(self) -> Any:
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None

    def text(self) -> str:
        return self.body[:200].decode(errors="replace")


async def _ask(
    socket_path: str, method: str, path: str, body: bytes = b"", limit_s: float = ANSWER_LIMIT_S
) -> _Answer | None:
    """The answer, or None if none came in time. With `Connection: close` the stream ends it.

    Raises _NotAsked if it is not the engine that kept it from being asked.
    """
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            try:
                head = (
                    f"{method} {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                raw = await _read_all(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:  # TimeoutError is an OSError; it has no errno
        if error.errno in OURS:
            raise _NotAsked from error
        return None
    head_bytes, separator, payload = raw.partition(b"\r\n\r\n")
    parts = head_bytes.split(b" ", 2)
    if not separator or len(parts) < 2 or not parts[1].isdigit():
        return None
    return _Answer(int(parts[1]), payload)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await reader.read(65_536):
        size += len(chunk)
        if size > ANSWER_LIMIT_BYTES:
            raise OSError(f"an answer of more than {ANSWER_LIMIT_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)

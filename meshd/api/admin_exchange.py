"""Requests and answers on the admin socket: bodies, JSON, streams of lines, errors.

Errors have the shape of the API's: `{"error": {"message", "code"}}`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from meshd.errors import InvalidRequest, MeshdError

B = TypeVar("B", bound=BaseModel)


class NoBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_body(kind: type[B], body: bytes) -> B:
    """Raises InvalidRequest, naming the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "body"
        raise InvalidRequest(f"{where}: {problem['msg']}", param=where) from None


def json_answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


async def answer_lines(
    request: web.Request, events: AsyncGenerator[dict[str, Any], None]
) -> web.StreamResponse:
    """Send `events` as they come, as `application/x-ndjson`, one a line.

    An error before the first is raised; a later one becomes the last line, `{"t":"failed",…}`, as
    the status is out by then. When the client hangs up this is cancelled, and `events` is closed.
    """
    async with contextlib.aclosing(events):
        first = await anext(events, None)
        response = web.StreamResponse()
        response.content_type = "application/x-ndjson"
        await response.prepare(request)
        with contextlib.suppress(_HungUp):
            if first is not None:
                await _write_line(response, first)
            try:
                async for event in events:
                    await _write_line(response, event)
            except MeshdError as error:
                await _write_line(response, failed_event(error))
    return response


async def _write_line(response: web.StreamResponse, event: dict[str, Any]) -> None:
    try:
        await response.write(orjson.dumps(event) + b"\n")
    except ConnectionResetError:
        raise _HungUp from None


class _HungUp(Exception):
    """Nobody reads the answer any more."""


def failed_event(error: MeshdError) -> dict[str, Any]:
    return {
        "t": "failed",
        "code": error.code,
        "message": error.message,
        "permanent": not error.retryable,
        "retry_after_s": error.retry_after_s,
    }


@web.middleware
async def error_answers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except MeshdError as error:
        return json_answer({"error": {"message": error.message, "code": error.code}}, error.status)
    except web.HTTPException as error:
        return json_answer({"error": {"message": error.reason, "code": "not_found"}}, error.status)

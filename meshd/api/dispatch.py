"""The slow lane's requests: checks, limits, and which handler answers."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import ClientPayloadError, HttpVersion10, HttpVersion11
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_exceptions import HTTPException
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from meshd.api.access import OPEN_PATHS
from meshd.api.connection import Connection
from meshd.api.exchange import Exchange
from meshd.api.front import Front
from meshd.api.paths import FORWARDED, RELAY_PATHS
from meshd.api.responses import error_body, error_headers
from meshd.errors import (
    ExpectationFailed,
    InvalidRequest,
    MeshdError,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedEncoding,
)

if TYPE_CHECKING:
    from meshd.api.read_side import ReadSide

Handler = Callable[[BaseRequest], Awaitable[StreamResponse]]

MODEL_PREFIX = "/v1/models/"
EXPOSED = "x-request-id, x-meshd-node, x-meshd-route, x-meshd-attempts, x-meshd-queue-ms"
CORS_REQUEST_HEADERS = (
    "authorization, content-type, x-api-key, x-request-id, x-meshd-wait-s, "
    "anthropic-version, anthropic-beta, openai-beta"
)
PREFLIGHT_MAX_AGE_S = 600


class Dispatch:
    """`front` is set before the first request."""

    front: Front

    def __init__(self, read_side: ReadSide) -> None:
        self._get: Mapping[str, Handler] = read_side.handlers()
        self._get_model = read_side.model
        self._paths = (*self._get, *(path.decode() for path in RELAY_PATHS))

    async def __call__(self, request: BaseRequest) -> StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.enter_request()
        given = request.headers.get("x-request-id", "").encode("latin-1", "replace")
        request_id = self.front.request_id(given)
        cors: dict[str, str] = {}
        try:
            if connection.peer is not None:
                answer = await self._serve_peer(request, connection, request_id)
            else:
                cors = self._cors(request)
                answer = await self._serve(request, connection, request_id, cors)
        except MeshdError as error:
            answer = _error(error, request_id.decode())
        finally:
            connection.leave_request()
        if isinstance(answer, Relayed) or answer.prepared:
            return answer
        answer.headers["x-request-id"] = request_id.decode()
        answer.headers["Server"] = "meshd"
        answer.headers.update(cors)
        if self.front.relay.draining:
            answer.force_close()
        return answer

    async def _serve(
        self,
        request: BaseRequest,
        connection: Connection,
        request_id: bytes,
        cors: dict[str, str],
    ) -> StreamResponse:
        path, access = request.path, self.front.access
        hosts = request.headers.getall("host", [])
        if len(hosts) > 1 or (not hosts and request.version >= HttpVersion11):
            raise InvalidRequest("a request needs exactly one `Host` header")
        if hosts:
            access.check_host(hosts[0].encode("latin-1", "replace"))
        if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
            return _preflight()
        if path not in OPEN_PATHS:
            access.check_key(_bytes(request, "authorization"), _bytes(request, "x-api-key"))
        if request.method in ("GET", "HEAD"):
            handler = self._get.get(path)
            if handler is None and path.startswith(MODEL_PREFIX):
                handler = self._get_model
            if handler is not None:
                return await handler(request)
        elif request.method == "POST" and path.encode("latin-1", "replace") in RELAY_PATHS:
            return await self._relay(request, connection, request_id, cors)
        raise self._no_such(request)

    async def _serve_peer(
        self, request: BaseRequest, connection: Connection, request_id: bytes
    ) -> StreamResponse:
        path = request.path
        if request.method != "POST" or path.encode("latin-1", "replace") not in RELAY_PATHS:
            raise NotFound(f"there is nothing at {path[:256]} for other nodes")
        return await self._relay(request, connection, request_id, {})

    async def _relay(
        self,
        request: BaseRequest,
        connection: Connection,
        request_id: bytes,
        cors: dict[str, str],
    ) -> StreamResponse:
        front = self.front
        path = request.path.encode("latin-1")
        from_peer = connection.peer is not None
        wait_s = 0.0 if from_peer else front.wait_s(_bytes(request, "x-meshd-wait-s"))
        self._check_body_headers(request)
        if "expect" in request.headers:
            _expect(request, connection)
        body = await self._read_body(request)
        query = request.rel_url.raw_query_string
        forward = b"".join(
            b"%b: %b\r\n" % (name.encode(), value.encode("latin-1", "replace"))
            for name, value in request.headers.items()
            if name.lower().encode("latin-1", "replace") in FORWARDED
        )
        exchange = Exchange(
            front.relay,
            connection,
            path=path + b"?" + query.encode() if query else path,
            needs_slot=RELAY_PATHS[path],
            body=body,
            forward=forward,
            request_id=request_id,
            origin=connection.origin,
            wait_s=wait_s,
            keep_alive=request.keep_alive,
            http10=request.version <= HttpVersion10,
            extra_lines=b"".join(b"%b: %b\r\n" % (k.encode(), v.encode()) for k, v in cors.items()),
            from_peer=from_peer,
        )
        await connection.run_exchange(exchange)
        return Relayed(exchange.keep_alive)

    # -- bodies -----------------------------------------------------------------------------------

    def _check_body_headers(self, request: BaseRequest) -> None:
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise UnsupportedEncoding(
                f"request bodies are read as they are, `content-encoding: {coding[:64]}` is not; "
                "send the JSON uncompressed"
            )
        if (request.content_length or 0) > self.front.settings.max_body_bytes:
            raise self._too_large()

    async def _read_body(self, request: BaseRequest) -> bytes:
        limit, limit_s = self.front.settings.max_body_bytes, self.front.settings.body_timeout_s
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limit_s):
                async for piece in request.content.iter_any():
                    size += len(piece)
                    if size > limit:
                        raise self._too_large()
                    pieces.append(piece)
        except TimeoutError:
            raise RequestTimeout(
                f"the request body was not complete within {limit_s:g} s"
            ) from None
        except (ClientPayloadError, HttpProcessingError, HTTPException) as error:
            raise InvalidRequest(f"the request body is broken: {error}") from None
        return b"".join(pieces)

    def _too_large(self) -> RequestTooLarge:
        limit = self.front.settings.max_body_bytes
        return RequestTooLarge(
            f"the request body is over the limit of {limit} bytes (`api.max_body_bytes`)"
        )

    # -- what does not exist ----------------------------------------------------------------------

    def _no_such(self, request: BaseRequest) -> MeshdError:
        path = request.path
        if path.encode("latin-1", "replace") in RELAY_PATHS:
            return _WrongMethod(request.method, path, "POST, OPTIONS")
        if path in self._get or path.startswith(MODEL_PREFIX):
            return _WrongMethod(request.method, path, "GET, HEAD, OPTIONS")
        close = difflib.get_close_matches(path[:256], self._paths, n=3, cutoff=0.6)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        return NotFound(f"there is nothing at {path[:256]}{hint}")

    def _cors(self, request: BaseRequest) -> dict[str, str]:
        origin = request.headers.get("origin")
        if origin is None:
            return {}
        if not self.front.access.check_origin(origin, request.headers.get("host", "")):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": EXPOSED,
            "Vary": "Origin",
        }


class Relayed(StreamResponse):
    """What a handler returns for an answer that is already on its way: aiohttp writes nothing."""

    def __init__(self, keep_alive: bool) -> None:
        super().__init__()
        self._relayed_keep_alive = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._relayed_keep_alive

    async def prepare(self, request: BaseRequest) -> Any:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


class _WrongMethod(MethodNotAllowed):
    def __init__(self, method: str, path: str, allow: str) -> None:
        super().__init__(f"{method} is not possible on {path}; it takes {allow}")
        self.allow = allow


def _error(error: MeshdError, request_id: str) -> Response:
    headers = error_headers(error, request_id)
    if isinstance(error, _WrongMethod):
        headers["Allow"] = error.allow
    answer = Response(
        status=error.status,
        body=error_body(error),
        content_type="application/json",
        headers=headers,
    )
    if isinstance(error, (RequestTooLarge, RequestTimeout, ExpectationFailed)):
        answer.force_close()  # part of the body may still be on its way
    return answer


def _preflight() -> Response:
    return Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
            "Access-Control-Allow-Headers": CORS_REQUEST_HEADERS,
            "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
        },
    )


def _expect(request: BaseRequest, connection: Connection) -> None:
    """aiohttp's low-level server leaves this to its handler."""
    expected = request.headers["expect"]
    if expected.strip().lower() != "100-continue":
        raise ExpectationFailed(f"`expect: {expected[:64]}` cannot be met; leave it out")
    if request.version >= HttpVersion11 and connection.transport is not None:
        connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _bytes(request: BaseRequest, name: str) -> bytes | None:
    value = request.headers.get(name)
    return None if value is None else value.encode("utf-8", "surrogateescape")

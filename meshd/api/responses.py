"""Answers made here: the one builder of errors, and heads written without a framework.

An error is OpenAI's object, `{"error":{"message","type","param","code"[,"meshd"]}}`; every answer
carries `x-request-id`, a retryable one with a known time `Retry-After` (whole seconds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson

from meshd.errors import MeshdError

JSON_TYPE = b"application/json"

REASONS: Mapping[int, bytes] = {s.value: s.phrase.encode() for s in HTTPStatus}

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""`error.type` as OpenAI's SDKs know it; other 4xx are invalid requests, 5xx server errors."""


class InternalError(MeshdError):
    """A bug of meshd; the log has the traceback."""

    code, status = "internal_error", 500


def error_object(error: MeshdError) -> dict[str, Any]:
    kind = _TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    inner: dict[str, Any] = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
    }
    if error.detail is not None:
        inner["meshd"] = error.detail
    return {"error": inner}


def error_body(error: MeshdError) -> bytes:
    return orjson.dumps(error_object(error))


def error_event(error: MeshdError) -> bytes:
    """The same object as one server-sent event, for an answer that has already begun."""
    return b"data: " + error_body(error) + b"\n\n"


def retry_after(error: MeshdError) -> str | None:
    """Value of `Retry-After`; None if the error has none."""
    if not error.retryable or error.retry_after_s is None:
        return None
    return str(max(1, math.ceil(error.retry_after_s)))


def error_headers(error: MeshdError, request_id: str) -> dict[str, str]:
    headers = {"x-request-id": request_id}
    after = retry_after(error)
    if after is not None:
        headers["Retry-After"] = after
    return headers


def error_bytes(
    error: MeshdError,
    request_id: str,
    *,
    keep_alive: bool,
    extra: bytes = b"",
    http10: bool = False,
) -> bytes:
    """Head and body of an error answer. `extra`: further header lines, each with its CRLF."""
    body = error_body(error)
    lines = b"".join(
        b"%b: %b\r\n" % (name.encode(), value.encode())
        for name, value in error_headers(error, request_id).items()
    )
    return answer_bytes(
        error.status, body, JSON_TYPE, extra + lines, keep_alive=keep_alive, http10=http10
    )


def answer_bytes(
    status: int,
    body: bytes,
    content_type: bytes,
    lines: bytes,
    *,
    keep_alive: bool,
    http10: bool = False,
) -> bytes:
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
        status,
        REASONS.get(status, b"Unknown"),
        content_type,
        len(body),
        lines,
        connection_line(keep_alive, http10),
        body,
    )


def connection_line(keep_alive: bool, http10: bool) -> bytes:
    """HTTP/1.1 keeps alive unless told; HTTP/1.0 closes unless told."""
    if not keep_alive:
        return b"connection: close\r\n"
    return b"connection: keep-alive\r\n" if http10 else b""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"

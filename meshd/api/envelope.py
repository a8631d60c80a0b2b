"""What is read of a request's body: enough to route it, once, and nothing of what was said."""

from __future__ import annotations

from typing import Any

import orjson

from meshd.errors import InvalidRequest


def read_envelope(body: bytes) -> tuple[str, bool]:
    """`model` and whether an answer in events is asked for. Raises InvalidRequest."""
    try:
        envelope: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from None
    if type(envelope) is not dict:
        raise InvalidRequest("the request body must be a JSON object")
    model = envelope.get("model")
    if type(model) is not str or not model:
        what = "is missing" if model is None else "must be a non-empty string"
        raise InvalidRequest(f"`model` {what}; GET /v1/models lists the names", param="model")
    return model, envelope.get("stream") is True

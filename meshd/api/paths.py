"""The paths of :9337."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

RELAY_PATHS: Final[Mapping[bytes, bool]] = MappingProxyType(
    {
        b"/v1/chat/completions": True,
        b"/v1/completions": True,
        b"/v1/embeddings": True,
        b"/v1/rerank": True,
        b"/v1/responses": True,
        b"/v1/messages": True,
        b"/v1/messages/count_tokens": False,
        b"/tokenize": False,
        b"/detokenize": False,
        b"/apply-template": False,
        b"/infill": True,
    }
)
"""Relayed by POST to the engine of `model`, and whether a call takes one of its slots."""

FORWARDED: Final = frozenset(
    (
        b"content-type",
        b"accept",
        b"traceparent",
        b"anthropic-version",
        b"anthropic-beta",
        b"openai-beta",
    )
)
"""Request headers that travel to the engine. Not among them: the key, cookies, the origin."""

"""Ranges of files from the hub, through huggingface_hub's own session. Blocking.

huggingface_hub gives address, token, proxies and errors; what it cannot do is go on with a file or
fetch a part of one, so the request for a range is made here. Nothing but an answer 206 that says to
be exactly the range asked for is read, and no byte behind it: a whole file, a web page or an answer
that goes on never gets anywhere. Imports huggingface_hub, hence only in the fetch child.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented as its place
    build_hf_headers,
    hf_raise_for_status,
)

from meshd import __version__
from meshd.cache.chunks import CHUNK_BYTES, chunk_span
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.transfer.flights import Span
from meshd.errors import HubRefused, HubUnavailable, MeshdError

CONNECT_S: Final = 10.0

Translate = Callable[[Exception, str], MeshdError]
"""An error of huggingface_hub about a repository, in our words."""


class Deliver(Protocol):
    def __call__(self, index: int, data: memoryview) -> bool:
        """Chunk `index` came; `data` may be overwritten afterwards. Whether to go on."""


class HubFile:
    """One file as the hub has it. For several threads."""

    def __init__(
        self, manifest: Manifest, shard: Shard, *, stall_s: float, translate: Translate
    ) -> None:
        self._shard = shard
        self._repo = manifest.repo
        self._revision = manifest.revision
        self._stall_s = stall_s
        self._translate = translate
        self._lock = threading.Lock()
        self._location: _Location | None = None

    def fetch(self, span: Span, buffer: memoryview, deliver: Deliver) -> None:
        """Get the chunks of `span`, in order, each through `buffer` (of CHUNK_BYTES).

        Raises HubRefused, HubUnavailable; what was delivered by then counts.
        """
        start = span.first * CHUNK_BYTES
        stop = min(start + span.count * CHUNK_BYTES, self._shard.size)
        with self._range(start, stop) as pieces:
            self._read(pieces, span, buffer, deliver)

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`. Raises HubRefused, HubUnavailable."""
        data = bytearray()
        with self._range(start, stop) as pieces:
            for piece in pieces:
                data += piece[: stop - start - len(data)]
                if len(data) == stop - start:
                    return bytes(data)
            raise self._ended_early()

    @contextlib.contextmanager
    def _range(self, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """The bytes of that range, piece by piece; perhaps too few, or too many."""
        location = self._locate()
        try:
            with self._range_at(location, start, stop) as pieces:
                yield pieces
        except MeshdError:
            # Its signature may have run out, or the host it leads to is ill: ask where to go.
            self._forget(location)
            raise

    @contextlib.contextmanager
    def _range_at(self, location: _Location, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        headers = location.headers | {"Range": f"bytes={start}-{stop - 1}"}
        try:
            # A silence of `stall_s` ends it; huggingface_hub's own limit is for whole downloads.
            timeout = (min(CONNECT_S, self._stall_s), self._stall_s, self._stall_s, self._stall_s)
            with get_session().stream(
                "GET", location.url, headers=headers, timeout=timeout
            ) as response:
                hf_raise_for_status(response)
                self._check_range(response, start, stop)
                yield response.iter_raw()
        except MeshdError:
            raise
        except Exception as error:  # its kinds are those of whatever client it uses
            raise self._translate(error, self._repo) from error

    def _read(
        self, pieces: Iterator[bytes], span: Span, buffer: memoryview, deliver: Deliver
    ) -> None:
        index, last = span.first, span.first + span.count - 1
        length, filled = chunk_span(index, self._shard.size)[1], 0
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                part = rest[: length - filled]
                buffer[filled : filled + len(part)] = part
                rest = rest[len(part) :]
                filled += len(part)
                if filled < length:
                    continue
                if not deliver(index, buffer[:length]) or index == last:
                    return
                index += 1
                length, filled = chunk_span(index, self._shard.size)[1], 0
        raise self._ended_early()

    def _ended_early(self) -> HubUnavailable:
        return HubUnavailable(f"the hub ended {self._shard.name} too early")

    def _check_range(self, response: Any, start: int, stop: int) -> None:
        name = self._shard.name
        if response.status_code != 206:
            kind = response.headers.get("content-type", "").split(";")[0] or "no type"
            raise HubUnavailable(
                f"the hub answered with something else ({kind}) than the part of {name} it was "
                "asked for"
            )
        if response.headers.get("content-encoding", "identity") != "identity":
            raise HubUnavailable(f"the hub sent {name} compressed, unasked")
        told = response.headers.get("content-range", "")
        if told != f"bytes {start}-{stop - 1}/{self._shard.size}":
            raise HubUnavailable(
                f"the hub sent another part of {name} than it was asked for ({told or 'unnamed'})"
            )

    def _locate(self) -> _Location:
        """Where the bytes lie; asked once, and again when that is refused."""
        with self._lock:
            if self._location is None:
                self._location = self._ask()
            return self._location

    def _forget(self, location: _Location) -> None:
        with self._lock:
            if self._location is location:
                self._location = None

    def _ask(self) -> _Location:
        url = hf_hub_url(self._repo, self._shard.path, revision=self._revision)
        try:
            headers = build_hf_headers(library_name="meshd", library_version=__version__)
            found = get_hf_file_metadata(
                url, headers=headers, timeout=min(CONNECT_S, self._stall_s)
            )
        except Exception as error:  # as above
            raise self._translate(error, self._repo) from error
        if found.etag != self._shard.sha256 or found.size not in (None, self._shard.size):
            raise HubRefused(
                f"{self._repo} has another {self._shard.path} now than its own listing says "
                f"(sha256 {found.etag}, expected {self._shard.sha256})"
            )
        if urlsplit(found.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the signature in the address speaks for us
        headers["Accept-Encoding"] = "identity"
        return _Location(found.location, headers)


@dataclass(frozen=True, slots=True)
class _Location:
    url: str
    headers: dict[str, str]

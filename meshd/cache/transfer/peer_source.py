"""One shard as another node has it: the client's end of a stream. Blocking, for one thread."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ValidationError

from meshd.cache.chunks import CHUNK_BYTES, HASH_BYTES, chunk_count
from meshd.cache.manifest import MAX_SHARDS, Manifest, Shard
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.words import Offer, OpenStream, PeerSource, Stream
from meshd.errors import PeerRefused, ProtocolError

MAX_MANIFESTS = 16
"""More different sets than one reference can mean."""


class PeerFile:
    """Requests may be sent ahead: `ask` for a span while an earlier one is still to be read."""

    def __init__(self, stream: Stream, offer: Offer, shard: Shard) -> None:
        self._stream = stream
        self._offer = offer
        self._shard = shard

    @classmethod
    def open(cls, open_stream: OpenStream, peer: PeerSource, shard: Shard) -> Self:
        """Raises PeerUnreachable, PeerRefused (it has nothing of it, or not in our way),
        ProtocolError."""
        wanted = {"t": "open", "service": "shard", "sha256": shard.sha256}
        stream, answer = open_stream(peer, wanted)
        try:
            offer = Offer.model_validate(answer)
        except ValidationError:
            stream.close()
            raise ProtocolError(f"node {peer.name} offered {shard.name} in no known way") from None
        if offer.size != shard.size or offer.chunk_bytes != CHUNK_BYTES:
            stream.close()
            raise PeerRefused(f"node {peer.name} has another {shard.name}", reason="other_file")
        return cls(stream, offer, shard)

    @property
    def whole(self) -> bool:
        """It has all of it; otherwise `have` changes."""
        return self._offer.whole

    def hashes(self) -> bytes | None:
        """Of the chunks; None if it knows none."""
        if not self._offer.hashes:
            return None
        return self._bytes_of("hashes", chunk_count(self._shard.size) * HASH_BYTES)

    def have(self) -> bytes | None:
        """One bit a chunk: what it has now; None if it has all."""
        if self.whole:
            return None
        return self._bytes_of("have", -(-chunk_count(self._shard.size) // 8))

    def ask(self, span: Span) -> None:
        offset = span.first * CHUNK_BYTES
        length = min(span.count * CHUNK_BYTES, self._shard.size - offset)
        self._stream.send({"t": "read", "offset": offset, "length": length})

    def begin(self, span: Span) -> bool:
        """The answer to the oldest request, which was for `span`: whether its chunks follow, each
        to be `read`. False: it has them not (any more)."""
        answer = self._stream.receive()
        if answer.get("t") == "refused":
            return False
        length = min(span.count * CHUNK_BYTES, self._shard.size - span.first * CHUNK_BYTES)
        _check(answer, "data", length)
        return True

    def read(self, buffer: memoryview) -> None:
        """The next bytes."""
        self._stream.read_into(buffer)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes of a file that is `whole`, at most MAX_READ_BYTES; with nothing sent ahead. Raises
        PeerRefused if it is not there any more."""
        self._stream.send({"t": "read", "offset": start, "length": stop - start})
        answer = self._stream.receive()
        if answer.get("t") == "refused":
            raise PeerRefused(f"{self._shard.name} is not there any more", reason="not_there")
        _check(answer, "data", stop - start)
        data = bytearray(stop - start)
        self._stream.read_into(memoryview(data))
        return bytes(data)

    def close(self) -> None:
        self._stream.close()

    def abort(self) -> None:
        """End it from another thread."""
        self._stream.abort()

    def _bytes_of(self, kind: str, length: int) -> bytes:
        self._stream.send({"t": kind})
        _check(self._stream.receive(), kind, length)
        data = bytearray(length)
        self._stream.read_into(memoryview(data))
        return bytes(data)


def ask_manifests(open_stream: OpenStream, peer: PeerSource, ref: str) -> tuple[Manifest, ...]:
    """What `peer` knows under `ref`. Raises PeerUnreachable, PeerRefused, ProtocolError."""
    stream, answer = open_stream(peer, {"t": "open", "service": "manifest", "ref": ref})
    stream.close()
    told = answer.get("manifests")
    if not isinstance(told, list) or len(told) > MAX_MANIFESTS:
        raise ProtocolError(f"node {peer.name} answered with no list of manifests")
    try:
        return tuple(Manifest.model_validate(one) for one in told)
    except ValidationError:
        raise ProtocolError(
            f"node {peer.name} sent a manifest that is none, or of more than {MAX_SHARDS} files"
        ) from None


def _check(answer: dict[str, Any], kind: str, length: int) -> None:
    if answer.get("t") != kind or answer.get("length") != length:
        raise ProtocolError(f"the answer is not {length} bytes of {kind}")

"""Reading weights out to another node: the server's end of a stream of one shard. Blocking.

Runs in the carrier process, a thread a stream. The daemon decided that the file may be read; here
it is only made sure that it still is that file, and that of a partial no more is read than its
journal lists.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any, Final

from meshd.cache.chunks import CHUNK_BYTES, HASH_BYTES, chunk_count
from meshd.cache.hashes import read_fully
from meshd.cache.transfer.partial import journal_bits
from meshd.cache.transfer.words import MAX_READ_BYTES, Grant, Offer, Stream
from meshd.errors import PeerUnreachable, ProtocolError

ALL: Final = b"\xff"


def serve_shard(stream: Stream, grant: Grant) -> None:
    """Answer the opening of the stream, then its requests, until the other side has enough.

    Raises ProtocolError for what may not be asked, and when the file shrinks under it.
    """
    with contextlib.suppress(PeerUnreachable):  # done, or gone
        try:
            fd = _open(grant)
        except OSError:
            stream.send(_refusal("gone", "the file is not here any more"))
            return
        try:
            hashes = _hashes(grant)
            stream.send(_offer(grant, hashes))
            _Reading(stream, grant, fd, hashes).answer_all()
        finally:
            os.close(fd)


class _Reading:
    def __init__(self, stream: Stream, grant: Grant, fd: int, hashes: bytes | None) -> None:
        self._stream = stream
        self._grant = grant
        self._fd = fd
        self._hashes = hashes
        self._bits = _bits(grant)
        self._buffer = memoryview(bytearray(min(CHUNK_BYTES, grant.size)))

    def answer_all(self) -> None:
        while True:
            request = self._stream.receive()
            match request.get("t"):
                case "read":
                    self._answer_read(request)
                case "have":
                    self._bits = _bits(self._grant)
                    self._send_bytes("have", self._bits)
                case "hashes" if self._hashes is not None:
                    self._send_bytes("hashes", self._hashes)
                case other:
                    raise ProtocolError(f"a stream of a shard has no request {str(other)[:40]!r}")

    def _answer_read(self, request: dict[str, Any]) -> None:
        offset, length = request.get("offset"), request.get("length")
        if (
            type(offset) is not int
            or type(length) is not int
            or offset < 0
            or not 0 < length <= MAX_READ_BYTES
            or offset + length > self._grant.size
        ):
            raise ProtocolError("a read of bytes that the shard does not have")
        if not self._may_read(offset, length):
            self._stream.send(_refusal("not_there", "not there yet, or not any more"))
            return
        self._stream.send({"t": "data", "length": length})
        done = 0
        while done < length:
            piece = self._buffer[: min(len(self._buffer), length - done)]
            if read_fully(self._fd, piece, offset + done) < len(piece):
                raise ProtocolError(f"{self._grant.path} became shorter while it was read")
            self._stream.write(piece)
            done += len(piece)

    def _may_read(self, offset: int, length: int) -> bool:
        wanted = range(offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES + 1)
        if not all(self._listed(index) for index in wanted):
            self._bits = _bits(self._grant)
        return all(self._listed(index) for index in wanted)

    def _listed(self, index: int) -> bool:
        return bool(self._bits[index // 8] >> index % 8 & 1)

    def _send_bytes(self, kind: str, data: bytes) -> None:
        self._stream.send({"t": kind, "length": len(data)})
        self._stream.write(memoryview(data))


def _open(grant: Grant) -> int:
    """Raises OSError, also if it is no regular file of the granted size."""
    fd = os.open(grant.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != grant.size:
        os.close(fd)
        raise OSError("not the file that was granted")
    return fd


def _hashes(grant: Grant) -> bytes | None:
    if grant.hashes_path is None:
        return None
    length = chunk_count(grant.size) * HASH_BYTES
    try:
        with Path(grant.hashes_path).open("rb") as file:
            found = file.read(length + 1)
    except OSError:
        return None
    return found if len(found) == length else None


def _bits(grant: Grant) -> bytes:
    """What may be read now; all of a file that is whole."""
    length = -(-chunk_count(grant.size) // 8)
    if grant.journal_path is None:
        return ALL * length
    try:
        found = journal_bits(grant.journal_path)
    except (OSError, ValueError):
        return bytes(length)  # it landed, or was given up: either way it is another file now
    return found if len(found) == length else bytes(length)


def _offer(grant: Grant, hashes: bytes | None) -> dict[str, Any]:
    return Offer(
        size=grant.size,
        chunk_bytes=CHUNK_BYTES,
        whole=grant.journal_path is None,
        hashes=hashes is not None,
    ).model_dump()


def _refusal(reason: str, message: str) -> dict[str, Any]:
    return {"t": "refused", "reason": reason, "message": message}

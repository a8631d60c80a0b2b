"""A small model at a local hub, orders for it, and neighbours that have it, in this process."""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from meshd.cache.chunks import CHUNK_BYTES, chunk_count
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.transfer import child
from meshd.cache.transfer.serving import serve_shard
from meshd.cache.transfer.words import (
    Credentials,
    Done,
    FetchFailed,
    FetchOrder,
    Grant,
    News,
    OpenStream,
    PeerSource,
    Said,
)
from meshd.errors import PeerRefused, PeerUnreachable

REPO = "owner/Name-GGUF"
COMMIT = "c0" * 20
NAMES = ("Name-Q4_K_M-00001-of-00002.gguf", "Name-Q4_K_M-00002-of-00002.gguf")
_NEWS: TypeAdapter[News] = TypeAdapter(News)


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def chunk_hashes(data: bytes) -> bytes:
    return b"".join(
        hashlib.sha256(data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]).digest()
        for i in range(chunk_count(len(data)))
    )


def flipped(data: bytes, *offsets: int) -> bytes:
    changed = bytearray(data)
    for offset in offsets:
        changed[offset] ^= 1
    return bytes(changed)


def manifest_of(files: dict[str, bytes], commit: str = COMMIT) -> Manifest:
    return Manifest(
        repo=REPO,
        revision=commit,
        shards=tuple(
            Shard(path=path, size=len(data), sha256=sha256(data)) for path, data in files.items()
        ),
    )


def places_in(home: Path) -> Places:
    return Places(home / "hub", home / "state", home / "builtin")


def order_for(home: Path, manifest: Manifest | None, **more: Any) -> FetchOrder:
    places = places_in(home)
    if "peers" in more:
        more.setdefault("credentials", CREDENTIALS)
    return FetchOrder(
        ref=REPO,
        manifest=manifest,
        hub_dir=str(places.hub),
        state_dir=str(places.state),
        builtin_dir=str(places.builtin),
        **more,
    )


CREDENTIALS = Credentials(ca_der="", certificate_path="", key_path="", mesh_id="")


def carry_out(order: FetchOrder, open_stream: OpenStream | None = None) -> list[News]:
    """The news of a fetch in this process."""
    outgoing = io.BytesIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = child.main(
            io.BytesIO(order.model_dump_json().encode()), outgoing, lambda _: open_stream or nobody
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    news = [_NEWS.validate_json(line) for line in outgoing.getvalue().splitlines()]
    assert (status == 0) == isinstance(news[-1], Done)
    return news


def done(news: list[News]) -> Done:
    assert isinstance(news[-1], Done), news[-1]
    return news[-1]


def failed(news: list[News]) -> FetchFailed:
    assert isinstance(news[-1], FetchFailed), news[-1]
    return news[-1]


def said(news: list[News]) -> str:
    return "\n".join(one.message for one in news if isinstance(one, Said))


def landed(home: Path, manifest: Manifest, path: str) -> bytes:
    """The file as any program finds it."""
    return places_in(home).snapshot(manifest.repo, manifest.revision, path).read_bytes()


def nobody(peer: PeerSource, wanted: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    raise PeerUnreachable(f"nobody is at {peer.name}")


# -- streams --------------------------------------------------------------------------------------


class SocketStream:
    """`words.Stream` over a plain socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(20)

    def send(self, frame: dict[str, Any]) -> None:
        data = json.dumps(frame).encode()
        self.write(memoryview(struct.pack(">I", len(data)) + data))

    def receive(self) -> dict[str, Any]:
        header = bytearray(4)
        self.read_into(memoryview(header))
        data = bytearray(struct.unpack(">I", header)[0])
        self.read_into(memoryview(data))
        found = json.loads(data)
        assert isinstance(found, dict)
        return found

    def read_into(self, buffer: memoryview) -> None:
        while buffer:
            try:
                count = self._connection.recv_into(buffer)
            except OSError as error:
                raise PeerUnreachable(str(error)) from None
            if count == 0:
                raise PeerUnreachable("closed")
            buffer = buffer[count:]

    def write(self, data: memoryview) -> None:
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise PeerUnreachable(str(error)) from None

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Dying(SocketStream):
    """Breaks after so many bytes of it were written."""

    def __init__(self, connection: socket.socket, after: int) -> None:
        super().__init__(connection)
        self._left = after

    def write(self, data: memoryview) -> None:
        self._left -= len(data)
        if self._left < 0:
            self.abort()
        super().write(data)


class Silent(SocketStream):
    """Says nothing any more once it should send data."""

    def write(self, data: memoryview) -> None:
        if len(data) < CHUNK_BYTES // 2:
            super().write(data)
        else:
            self._connection.settimeout(None)
            while self._connection.recv(4096):
                pass
            raise PeerUnreachable("the other side has left")


@dataclass
class Neighbour:
    """A node that gives what `grants` says, in a thread a stream."""

    name: str
    grants: dict[str, Grant] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)
    stream: Callable[[socket.socket], SocketStream] = SocketStream
    refuses: str | None = None
    opened: int = 0
    services: list[str] = field(default_factory=list)
    """Of the streams that were opened."""

    def has(
        self,
        path: Path,
        data: bytes,
        *,
        sha256_of: bytes | None = None,
        hashes: bool = True,
        told: bytes | None = None,
    ) -> None:
        """It holds `data` under the sha256 of `sha256_of` (default: its own) and tells the hashes
        of the chunks of `told` (default: `data`)."""  # fmt: skip
        sha = sha256(data if sha256_of is None else sha256_of)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        listed = path.with_suffix(".hashes")
        listed.write_bytes(chunk_hashes(data if told is None else told))
        self.grants[sha] = Grant(str(path), len(data), sha, str(listed) if hashes else None, None)


@contextmanager
def neighbourhood(*neighbours: Neighbour) -> Iterator[OpenStream]:
    """How to reach them; at the end none of their threads is left."""
    by_name = {neighbour.name: neighbour for neighbour in neighbours}
    threads: list[threading.Thread] = []

    def open_stream(peer: PeerSource, wanted: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        neighbour = by_name[peer.name]
        neighbour.opened += 1
        neighbour.services.append(wanted["service"])
        if neighbour.refuses:
            raise PeerRefused("not now", reason=neighbour.refuses)
        if wanted["service"] == "manifest":
            return _Closed(), {
                "t": "open",
                "manifests": [m.model_dump(mode="json") for m in neighbour.manifests],
            }
        grant = neighbour.grants.get(wanted["sha256"])
        if grant is None:
            raise PeerRefused("it is not here", reason="not_in_cache")
        here, there = socket.socketpair()
        thread = threading.Thread(target=_serve, args=(neighbour.stream(there), grant))
        threads.append(thread)
        thread.start()
        stream = SocketStream(here)
        answer = stream.receive()
        if answer["t"] == "refused":
            stream.close()
            raise PeerRefused(answer["message"], reason=answer["reason"])
        return stream, answer

    yield open_stream
    for thread in threads:
        thread.join()


def _serve(stream: SocketStream, grant: Grant) -> None:
    try:
        serve_shard(stream, grant)
    finally:
        stream.close()


class _Closed:
    def close(self) -> None:
        pass


def peer(name: str) -> PeerSource:
    return PeerSource(node_id=f"id of {name}", name=name, addresses=("127.0.0.1:1",))

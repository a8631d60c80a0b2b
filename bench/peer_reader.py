"""A process that fetches weights from a node: `python -m bench.peer_reader ORDER`, a JSON object.

As the fetch child does, less its decisions: a thread a stream, two requests in flight, each chunk
hashed and compared, then written where it belongs. Says `ready`, waits for a line, fetches, and
says how long that took.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from meshd.cache.chunks import CHUNK_BYTES, HASH_BYTES, chunk_count, chunk_span
from meshd.cache.manifest import Shard
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.peer_source import PeerFile
from meshd.cache.transfer.words import Credentials, PeerSource
from meshd.peers.bulk.dialing import open_stream

SPAN_CHUNKS = 4


def main(order_json: str) -> int:
    order = json.loads(order_json)
    peer = PeerSource.model_validate(order["peer"])
    credentials = Credentials.model_validate(order["credentials"])
    shards = [Shard.model_validate(shard) for shard in order["shards"]]
    opener = partial(open_stream, credentials)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    with ThreadPoolExecutor(order["streams"]) as threads:
        work = [
            threads.submit(_fetch, PeerFile.open(opener, peer, shard), shard, Path(order["into"]))
            for shard in shards
        ]
        for each in work:
            each.result()
    print(json.dumps({"seconds": time.monotonic() - began, "cpu_s": sum(os.times()[:2])}))
    return 0


def _fetch(source: PeerFile, shard: Shard, into: Path) -> None:
    hashes = source.hashes()
    if hashes is None:
        raise SystemExit("the host knows no hashes")
    count = chunk_count(shard.size)
    spans = [
        Span(0, first, min(SPAN_CHUNKS, count - first)) for first in range(0, count, SPAN_CHUNKS)
    ]
    buffer = memoryview(bytearray(CHUNK_BYTES))
    fd = os.open(into / shard.sha256, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        source.ask(spans[0])
        for span, following in zip(spans, [*spans[1:], None], strict=True):
            if following is not None:
                source.ask(following)
            if not source.begin(span):
                raise SystemExit("the host has it not any more")
            for index in range(span.first, span.first + span.count):
                _take(source, index, shard.size, hashes, buffer, fd)
    finally:
        os.close(fd)
        source.close()


def _take(
    source: PeerFile, index: int, size: int, hashes: bytes, buffer: memoryview, fd: int
) -> None:
    offset, length = chunk_span(index, size)
    chunk = buffer[:length]
    source.read(chunk)
    expected = hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
    if hashlib.sha256(chunk).digest() != expected:
        raise SystemExit(f"chunk {index} is wrong")
    os.pwrite(fd, chunk, offset)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""A carrier process with services of its own, for tests: no weights, only bytes."""

from __future__ import annotations

import os
from typing import Any

from meshd.errors import PeerRefused
from meshd.peers.bulk.carrier import run_process
from meshd.peers.bulk.stream import BulkStream


def _bytes(stream: BulkStream, grant: dict[str, Any]) -> None:
    """As many bytes of the granted value as each request wants; `forever` without requests."""
    stream.send({"t": "open", "pid": os.getpid()} | grant)
    data = memoryview(bytes((grant["value"],)) * (1 << 20))
    while grant.get("forever"):
        stream.write(data)
    while True:
        wanted = stream.receive()
        if wanted["t"] == "bug":
            raise ZeroDivisionError
        if wanted["t"] == "refuse":
            raise PeerRefused("not any more", reason="gone")
        stream.send({"t": "data", "length": wanted["length"]})
        stream.write(data[: wanted["length"]])


def _answer(stream: BulkStream, grant: dict[str, Any]) -> None:
    stream.send(grant)


if __name__ == "__main__":
    run_process({"shard": _bytes, "manifest": _answer})

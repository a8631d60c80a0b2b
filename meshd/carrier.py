"""The carrier process: serves bulk streams to other nodes. The daemon starts it.

One of the composition roots: peers bring the streams, the cache knows what is in them.
"""

from __future__ import annotations

import logging
from typing import Any

from meshd.peers.bulk.carrier import give_way, run_process
from meshd.peers.bulk.pump import serve_rpc
from meshd.peers.bulk.stream import BulkStream


def _shard(stream: BulkStream, grant: dict[str, Any]) -> None:
    give_way()
    # Late: a carrier that is asked for manifests only need not know how files are read.
    from meshd.cache.transfer.serving import serve_shard
    from meshd.cache.transfer.words import Grant

    serve_shard(stream, Grant(**grant))


def _manifest(stream: BulkStream, grant: dict[str, Any]) -> None:
    stream.send(grant)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="carrier: %(levelname)s %(message)s")
    run_process({"shard": _shard, "manifest": _manifest, "rpc": serve_rpc})

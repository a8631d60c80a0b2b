"""A node that has weights, for benchmarks: `python -m bench.peer_host DIRECTORY HOST:PORT FILE...`.

Session, listener, hand-over and carrier are the daemon's own; there is nothing around them, and
what it serves is told on the command line instead of found in a cache. A file that has chunk hashes
beside it, under its name and `.chunks`, serves those too. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import uvloop

from meshd.cache.transfer.words import Grant
from meshd.config import split_address
from meshd.errors import PeerRefused
from meshd.ids import NodeId
from meshd.kernel import Pool
from meshd.peers.links.streams import Open
from tests.peers.station import Station


async def serve(directory: Path, address: str, files: list[Path]) -> None:
    host, port = split_address(address)
    pool = Pool("work", workers=2)
    station = Station(directory.name, directory.parent, pool, host=host)
    station.carrier = (sys.executable, "-m", "meshd.carrier")
    grants = {path.name: _grant(path) for path in files}

    def serve_bulk(_node: NodeId, wanted: Open) -> dict[str, Any]:
        if wanted.sha256 not in grants:
            raise PeerRefused("no file with that sha256 is here", reason="not_in_cache")
        return grants[wanted.sha256]

    station.serve_bulk = serve_bulk
    await station.start(port=port)
    print(station.id, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await station.stop()
    pool.close()


def _grant(path: Path) -> dict[str, Any]:
    """Of a file that goes by its sha256."""
    hashes = path.with_name(f"{path.name}.chunks")
    known = str(hashes) if hashes.exists() else None
    return Grant(str(path), path.stat().st_size, path.name, known, None).to_json()


if __name__ == "__main__":
    directory, address, *files = sys.argv[1:]
    uvloop.run(serve(Path(directory), address, [Path(f) for f in files]))

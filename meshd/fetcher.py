"""The process that fetches: `python -m meshd.fetcher`, an order on standard input.

A composition root of its own: it joins the cache's transfer with the peers' bulk streams and knows
nothing of the daemon that started it.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from meshd.cache.transfer import child
from meshd.cache.transfer.words import Credentials, OpenStream, PeerSource, Stream
from meshd.peers.bulk.dialing import open_stream

NICE = 10
"""Whoever is waiting for tokens comes first: a fetch takes all the processor time there is."""


def dial(credentials: Credentials) -> OpenStream:
    def dialled(peer: PeerSource, wanted: dict[str, Any]) -> tuple[Stream, dict[str, Any]]:
        return open_stream(credentials, peer, wanted)

    return dialled


def main() -> None:
    # What huggingface_hub logs goes to standard error, errors only: each becomes news as well.
    logging.basicConfig(level=logging.ERROR)
    os.nice(NICE)
    status = child.main(sys.stdin.buffer, sys.stdout.buffer, dial)
    # Threads that still wait for the network have nothing to say any more.
    os._exit(status)


if __name__ == "__main__":
    main()

"""The process of tunnels of a host whose model lies on other nodes too. The daemon starts it.

Of its own because each round trip of the engine goes through it: nothing else may hold that up.
"""

from __future__ import annotations

import logging

from meshd.peers.bulk.tunneling import run_process

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="tunnels: %(levelname)s %(message)s")
    run_process()

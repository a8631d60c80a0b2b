"""What a session gets from the node around it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshd.config import Config
from meshd.errors import PeerRefused
from meshd.ids import InstanceId, NodeId
from meshd.kernel import Board, Clock, FlightRecorder
from meshd.peers.deploying import Deployments
from meshd.peers.links.linking import Spawn
from meshd.peers.links.streams import Open
from meshd.view import View


def nothing_in_bulk(node: NodeId, wanted: Open) -> dict[str, Any]:
    raise PeerRefused(f"there is no service `{wanted.service}` here", reason="no_service")


def nothing_to_lend(node: NodeId, name: str) -> asyncio.Protocol:
    raise PeerRefused("this node lends no memory", reason="no_service")


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one session."""

    config: Config
    board: Board[View]
    clock: Clock
    rng: random.Random
    recorder: FlightRecorder
    spawn: Spawn
    inflight: Callable[[InstanceId], int]
    serve_api: Callable[[str], asyncio.Protocol]
    """A protocol that serves an authenticated peer, by its name, from this node's engines."""
    carrier: tuple[str, ...] = ()
    """The command that becomes the carrier of bulk streams; empty: they are not served."""
    serve_bulk: Callable[[NodeId, Open], dict[str, Any]] = nothing_in_bulk
    """What the carrier is to do for a node that asks so; of `shard` the grant, of `manifest` the
    answer itself. Raises PeerRefused."""
    bulk_lost: Callable[[], None] = lambda: None
    """The carrier ended unasked, and all that it served."""
    serve_loan: Callable[[NodeId, str], asyncio.Protocol] = nothing_to_lend
    """A protocol that lends memory to a node, by its id and its name. Raises PeerRefused."""
    deployments: Deployments | None = None
    """What the mesh should serve; None: this node takes no part in it."""

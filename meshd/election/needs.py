"""What the election needs of other rooms, as callables that node.py wires."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from meshd.election.memory import Memory
from meshd.election.words import StartHost
from meshd.ids import LoanId, ModelId, NodeId
from meshd.view import Preparing
from meshd.view.shape import MemoryParts, ModelShape


@dataclass(frozen=True, slots=True)
class Needs:
    """All but the awaited ones return at once."""

    start: Callable[[StartHost, int | None], None]
    """Load it; the bytes the engine may keep of prompts. Raises MeshdError."""
    stop: Callable[[ModelId, bool], None]
    """Unload; with or without the requests in flight. Raises ModelNotFound."""
    taken: Callable[[ModelId], Mapping[str, MemoryParts] | None]
    """By device: what the engine of a model that is ready said it takes."""
    engine: Callable[[], tuple[str, str | None]]
    """(id of the engine, why there is none)."""
    shape: Callable[[str], Awaitable[ModelShape]]
    """Of a REF, from the headers of its weights. Raises MeshdError."""
    prepare: Callable[[str, Callable[[Preparing], None]], Awaitable[object]]
    """Make the weights of a REF whole on this disk, saying how far it is. Raises MeshdError."""
    here: Callable[[str], str | None]
    """Why a REF means nothing on this machine; None if it does."""
    identify: Callable[[str], tuple[ModelId, str]]
    """REF to the name clients use, and to the one way of writing that REF; raises BadReference."""
    find_node: Callable[[str], NodeId]
    """Name of a node to its id; raises NotFound."""
    spread: Callable[[Collection[ModelId]], None]
    """Tell other nodes of deployments."""
    expects_others: Callable[[], bool]
    """Whether this node's mesh is known to have other members."""
    look_at_devices: Callable[[], None]
    """Have `View.devices` made anew."""
    auto: Callable[[Memory], str | None]
    """The REF `--auto` chooses for this memory; may block."""
    lends: Callable[[], str | None] = lambda: "this node has no RPC server"
    """Why this node can lend no memory to other nodes' models; None if it can."""
    end_loan: Callable[[LoanId, str], None] = lambda loan, reason: None
    """Stop what uses the memory of a loan, and tell its host why; `ElectionRoom.loan_ended` when
    that is done."""
    worker_lost: Callable[[ModelId], bool] = lambda model: False
    """Whether what this node hosts failed for want of a worker."""
    avoided: Callable[[], Collection[NodeId]] = frozenset
    """Nodes that refused to lend, or were lost as workers, a moment ago."""
    bytes_per_s: Callable[[], Mapping[NodeId, float]] = dict
    """What was measured of tunnels to other nodes, at best."""

"""What nodes agree on when one model lies on several of them. Sizes are bytes.

The host runs the engine; each worker lends memory of its devices through an RPC server of the same
engine's protocol. Layers of a model lie in a row: the first ones in the host's main memory, if some
stay there, then those of the workers in the order of the plan, then those of the host's own
accelerators; the output layer lies with the last ones. That is the order in which the engine
enumerates devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshd.ids import LoanId, ModelId, NodeId


@dataclass(frozen=True, slots=True)
class Lendable:
    """A memory of a node in which layers of another node's model may lie."""

    device: str
    """As that node's engine calls it."""
    free_bytes: int
    """Not leased now; coarse, so that it changes seldom."""
    accelerator: bool
    bytes_per_s: int | None = None
    """How fast its device reads it; None if that is not known."""


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """A worker as people are shown it."""

    node: NodeId
    name: str
    share: float
    """0..1 of the model's layers, by bytes; four decimals, so that all nodes show the same."""
    bytes: int
    """What it lends."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker holds of a split model."""

    node: NodeId
    name: str
    memory: tuple[tuple[str, int], ...]
    """To be leased, by device as the worker's engine calls it; in the order its RPC server lists
    them."""
    layers: tuple[int, ...]
    """Repeating layers on each of these devices."""
    first_layer: int
    """Number of the first of its layers."""
    output: bool
    """Whether it holds the output layer, on its last device."""
    share: float
    """0..1 of the model's layers, by bytes."""

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.memory)

    @property
    def shown(self) -> WorkerShare:
        return WorkerShare(self.node, self.name, round(self.share, 4), self.bytes)


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Who holds which layers."""

    parts: tuple[Part, ...]
    """At least one; in the engine's order of devices."""
    own: tuple[tuple[str, int], ...] = ()
    """Repeating layers on the host's accelerators, by device as its engine calls it; after the
    parts."""
    beside: int = 0
    """Repeating layers that stay in the host's main memory; the first ones."""

    @property
    def gpu_layers(self) -> int:
        """The engine's `--n-gpu-layers`: all that do not stay beside, and the output layer."""
        return sum(self.tensor_split)

    @property
    def tensor_split(self) -> tuple[int, ...]:
        """The engine's `--tensor-split`: layers of each device in its order; the output layer is
        one of the last device's."""
        rows = [n for part in self.parts for n in part.layers] + [n for _, n in self.own]
        return (*rows[:-1], rows[-1] + 1)


MAX_NEEDED_FILES: Final = 256
"""Of one worker; a part in more of them is sent by its host."""


@dataclass(frozen=True, slots=True)
class NeededWeights:
    """What a worker needs of the weights, by its host, which has them: for it to decide whether to
    fetch them from other nodes, and to do it."""

    ref: str
    """Of the set on its hub, with the commit."""
    files: tuple[tuple[str, int], ...]
    """sha256 and bytes of those in which its tensors lie, in order."""
    bytes: int
    """Of those of its tensors that it can keep, and that need not be sent to it then."""
    pushed_bytes: int
    """The same of all workers that do not say they hold the weights, this one included."""
    pushed_to: int
    """How many those are."""
    bytes_per_s: float | None
    """What its host has sent it in the best second so far; None if it never had much to send."""


@dataclass(frozen=True, slots=True)
class LoanAsk:
    """What a host asks one worker for."""

    model: ModelId
    epoch: int
    """Of the host's claim."""
    rpc_protocol: str
    """Of the host's engine."""
    part: Part
    digest: str | None
    """Of the weights, to find them on the worker's disk."""
    weights: NeededWeights | None = None
    """None if the host cannot say."""


@dataclass(frozen=True, slots=True)
class Loan:
    """Memory one worker has granted to one host, for as long as the host says it needs it."""

    id: LoanId
    host: NodeId
    ask: LoanAsk

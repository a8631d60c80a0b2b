"""What happens to the models of a node, and what is ordered then: the words of `hosting.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshd.ids import ModelId
from meshd.kernel.machine import Tick
from meshd.view import ModelState, Preparing, SplitPlan

Ticket = int


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What an operator or the election may ask for; None leaves it to the configuration."""

    context: int | None = None
    """Tokens per slot."""
    parallel: int | None = None
    """Slots."""
    prompt_cache_bytes: int | None = None
    """Main memory for conversations without a slot; None leaves it to the engine."""
    split: SplitPlan | None = None
    """Who holds which layers; None for a model that lies on this node alone."""
    epoch: int = field(default=0, compare=False)
    """Of this node's claim; workers are told. A new one alone asks for no other engine."""


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """What the cache proved about weights, as far as hosting needs it."""

    first_shard: str
    total_bytes: int
    trained_context: int | None
    capabilities: tuple[str, ...]
    digest: str | None
    created_at: int
    mmproj: str | None = None
    """Path of the projector for images or sound."""


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadAsked:
    ticket: Ticket
    model: ModelId
    ref: str
    options: LoadOptions = LoadOptions()


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    model: ModelId
    drain_s: float


@dataclass(frozen=True, slots=True)
class WeightsMoved:
    """The preparation goes on; never its end."""

    model: ModelId
    preparation: int
    now: Preparing


@dataclass(frozen=True, slots=True)
class WeightsAccepted:
    model: ModelId
    preparation: int
    facts: WeightFacts


@dataclass(frozen=True, slots=True)
class WeightsRejected:
    model: ModelId
    preparation: int
    reason: str
    retry_after_s: float | None = None
    """Not to be tried earlier; None if nothing is known of that."""


@dataclass(frozen=True, slots=True)
class EngineFound:
    """The binary to run is known."""


@dataclass(frozen=True, slots=True)
class EngineNotFound:
    """It was looked for; it will be again."""

    reason: str


@dataclass(frozen=True, slots=True)
class EngineReported:
    """The engine of `model` changed. `state` ABSENT means that it has stopped for good."""

    model: ModelId
    state: ModelState
    reason: str | None = None


Event = (
    LoadAsked
    | UnloadAsked
    | WeightsMoved
    | WeightsAccepted
    | WeightsRejected
    | EngineFound
    | EngineNotFound
    | EngineReported
    | Tick
)


# -- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AcceptLoad:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class RefuseLoad:
    ticket: Ticket
    reason: str


@dataclass(frozen=True, slots=True)
class PrepareWeights:
    """Ends in WeightsAccepted or WeightsRejected of the same `preparation`, or is abandoned."""

    model: ModelId
    ref: str
    preparation: int


@dataclass(frozen=True, slots=True)
class AbandonWeights:
    """Nobody waits for that preparation any more; what it got so far may stay."""

    model: ModelId
    preparation: int


@dataclass(frozen=True, slots=True)
class StartEngine:
    model: ModelId
    facts: WeightFacts
    options: LoadOptions


@dataclass(frozen=True, slots=True)
class StopEngine:
    """Ends in EngineReported(ABSENT)."""

    model: ModelId
    drain_s: float


Effect = AcceptLoad | RefuseLoad | PrepareWeights | AbandonWeights | StartEngine | StopEngine
